"""A random model of every preset: the hub's configuration with widths and depths shrunk and nothing else.

    facts ──> config.json as on the hub ──> transformers' own classes ──> random weights
                                        └─> tokenizer, template, processor files of the hub's form
    weights ──> names and dtype of the hub, in two shards with an index

Head rows, token ids, grids, pixel bounds, rope, strategies, tied or not: as on the hub. Widths are as
small as the hub's head_dim allows, so a 72B is 80 MB.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.presets.facts import built_as, facts
from tests.presets.tokenizers import save_tokenizer
from tests.templates import TEMPLATES

_SMALLEST = {"0.5b": 64, "qwen3-vl-2b": 64}
_WIDTH = 128
_TOWER_WIDTH = 64
_SHARDS = 2


def build(preset: str, directory: Path, *, seed: int = 0, weights: bool = True) -> Path:
    """Build a preset under `directory`, unless it is there already.

    Args:
        preset: Name in the table of facts.
        directory: Where its directory goes.
        seed: Of the weights.
        weights: Whether they are written; a plan needs none.

    Returns:
        The model's directory, which has the preset's own name.
    """
    target, twin = directory / preset, directory / built_as(preset)
    if target != twin and not target.exists():
        build(built_as(preset), directory, seed=seed, weights=weights)
        shutil.copytree(twin, target, ignore=None if weights else shutil.ignore_patterns("model*"))
    if not target.exists():
        partial = target.with_name(f"{preset}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        found = facts(preset)
        (partial / "config.json").write_text(json.dumps(hub_config(preset), indent=2))
        _save_processor(found, partial)
        if weights:
            _save_weights(found, partial, seed)
        partial.rename(target)
    return target


def hub_config(preset: str) -> dict[str, Any]:
    """The preset's config.json: the hub's keys, in the hub's places, small widths."""
    found = facts(preset)
    config = json.loads(json.dumps(found["config"]))
    config |= {"model_type": found["model_type"], "architectures": found["architectures"]}
    config["torch_dtype"] = found["dtype"]
    if "tie_word_embeddings" in found:
        config["tie_word_embeddings"] = found["tie_word_embeddings"]
    text = config.get("text_config", config)
    if "text_tie_word_embeddings" in found:
        text["tie_word_embeddings"] = found["text_tie_word_embeddings"]
    width = _SMALLEST.get(built_as(preset), _WIDTH)
    text |= {"vocab_size": found["head_rows"], **_text(width, found)}
    config["vision_config"] |= _TOWERS[found["shrunk"]["tower"]](width, found)
    return config


def _text(width: int, found: dict[str, Any]) -> dict[str, Any]:
    explicit = found["model_type"] == "qwen3_vl"
    heads = 2 if explicit else width // found["head_dim"]
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3 if explicit else 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        **({"head_dim": found["head_dim"]} if explicit else {}),
    }


def _siglip(width: int, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": _TOWER_WIDTH,
        "intermediate_size": 2 * _TOWER_WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }


def _clip(width: int, found: dict[str, Any]) -> dict[str, Any]:
    return _siglip(width, found) | {"num_hidden_layers": 3, "projection_dim": _TOWER_WIDTH}


def _qwen(width: int, found: dict[str, Any]) -> dict[str, Any]:
    shrunk = found["shrunk"]
    tower = {
        "depth": 4,
        "hidden_size": _TOWER_WIDTH,
        "intermediate_size": 2 * _TOWER_WIDTH,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    if "deepstack_visual_indexes" in shrunk:
        return tower | {"deepstack_visual_indexes": list(range(shrunk["deepstack_visual_indexes"]))}
    return tower | {"fullatt_block_indexes": [1, 3]}


_TOWERS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "siglip": _siglip,
    "clip": _clip,
    "qwen": _qwen,
}


def _save_processor(found: dict[str, Any], directory: Path) -> None:
    """The processor's files under the names and in the form that the hub has."""
    save_tokenizer(found, directory)
    images = dict(found["image_processor"])
    if edges := images.pop("pinpoint_edges", None):
        images["image_grid_pinpoints"] = [[height, width] for height in edges for width in edges]
        config = json.loads((directory / "config.json").read_text())
        config["image_grid_pinpoints"] = images["image_grid_pinpoints"]
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    named = {"processor_class": found["processor_class"]}
    files = {
        "preprocessor_config.json": images | named,
        "generation_config.json": found["generation"],
        found["template_file"]: {"chat_template": TEMPLATES[found["template"]]},
    }
    if found["processor"]:
        files["processor_config.json"] = found["processor"] | named
    if "video_processor" in found:
        files["video_preprocessor_config.json"] = found["video_processor"] | named
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2))


def _save_weights(found: dict[str, Any], directory: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = {
        hub_name(found["weights"], name): _draw(name, parameter, generator, tied).to(
            getattr(torch, found["dtype"])
        )
        for name, parameter in model.named_parameters()
    }
    names = sorted(state)
    shards = [names[number::_SHARDS] for number in range(_SHARDS)]
    table, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        save_file({name: state[name] for name in shard}, directory / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(shard, file))
        total += sum(state[name].nbytes for name in shard)
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _draw(name: str, parameter: Any, generator: Any, tied: bool) -> Any:
    """Spread logits, so that a top-k set is well conditioned; norms near one."""
    import torch

    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        is_head = "lm_head" in name or (tied and "embed_tokens" in name)
        return values * (0.5 if is_head else 0.08)
    return 1 + values * 0.02 if "norm" in name and name.endswith("weight") else values * 0.02


def hub_name(shape: str, name: str) -> str:
    """A parameter's name in hub checkpoints, from its name in transformers 5.

    Args:
        shape: `llava`, `qwen2.5-vl` or `qwen3-vl`.
        name: As in `named_parameters()`.
    """
    if shape == "qwen3-vl":
        return name
    if shape == "qwen2.5-vl":
        return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    inner = "vision_tower.vision_model."
    return name if name.startswith(inner) else name.replace("vision_tower.", inner, 1)
