"""The shipped tiny teacher at other sizes: a real vocabulary, larger images; same body, other answers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def resized_teacher(
    model: Path,
    target: Path,
    *,
    vocab: int | None = None,
    side: int | None = None,
    tower_heads: int | None = None,
) -> Path:
    """Copy a tiny LLaVA directory with a larger (tied) head, for larger images, or with other heads.

    Args:
        model: The directory.
        target: Where to.
        vocab: Rows of the head; new ones are drawn like the old ones.
        side: Pixels of an image's side; the positions' embeddings are drawn anew.
        tower_heads: Attention heads of the vision tower, whose weights stay.
    """
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    weights = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, rows: int) -> torch.Tensor:
        old = weights[name].float()
        fresh = torch.randn(rows - len(old), old.shape[1], generator=generator) * old.std()
        return torch.cat([old, fresh]).half()

    if vocab is not None:
        (name,) = [each for each in weights if each.endswith("embed_tokens.weight")]
        weights[name] = drawn(name, vocab)
        config["text_config"]["vocab_size"] = vocab
    if side is not None:
        (name,) = [each for each in weights if each.endswith("position_embedding.weight")]
        edge = side // config["vision_config"]["patch_size"]
        weights[name] = drawn(name, edge * edge)
        config["vision_config"]["image_size"], config["image_seq_length"] = side, edge * edge
        settings = json.loads((target / "processor_config.json").read_text())
        settings["image_processor"]["size"] = {"height": side, "width": side}
        (target / "processor_config.json").write_text(json.dumps(settings))
    if tower_heads is not None:
        config["vision_config"]["num_attention_heads"] = tower_heads
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
