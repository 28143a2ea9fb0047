"""Built presets are what the hub's files say: classes, rows, ids, ties, grids, names, dtype."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.fingerprint import fingerprints
from common.grids import image_layout
from common.models import PRESETS, resolve_model
from common.processor import load_processor, read_vocab_rows
from common.vocab import Vocabulary, shared_rows
from student_train.model import read_shape
from tests.presets.build import build
from tests.presets.facts import built_as, facts, families, presets

HUB = [name for name, preset in PRESETS.items() if preset.revision is not None]
BUILT = [name for name in HUB if built_as(name) == name]
SMALLEST = {family: next(iter(presets(family))) for family in families()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Where presets are built without weights."""
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="module")
def processors(plain) -> dict[str, Any]:
    """Every preset's processor as its files make it, loaded once."""
    from transformers import AutoProcessor

    return {preset: AutoProcessor.from_pretrained(build(preset, plain, weights=False)) for preset in HUB}


@pytest.mark.parametrize("preset", BUILT)
def test_transformers_reads_the_hubs_configuration_and_every_weight_name(preset, tmp_path):
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    found, directory = facts(preset), build(preset, tmp_path)
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert {name for name, keys in report.items() if keys} == set()
    assert type(model).__name__ == found["architectures"][0]
    assert str(model.dtype) == f"torch.{found['dtype']}"
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.shape[0] == embeddings.shape[0] == found["head_rows"]
    tied = found.get("text_tie_word_embeddings", found.get("tie_word_embeddings"))
    assert (head is embeddings) == tied
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 2
    assert any("lm_head" in name for name in index) == (not tied)
    for file in sorted(set(index.values())):
        with safe_open(directory / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, where in index.items() if where == file}
            assert {shard.get_tensor(name).dtype for name in shard.keys()} == {  # noqa: SIM118
                getattr(torch, found["dtype"])
            }


@pytest.mark.parametrize("preset", HUB)
def test_the_processor_is_the_hubs(preset, processors):
    found, processor = facts(preset), processors[preset]
    tokenizer, images = processor.tokenizer, processor.image_processor
    assert type(processor).__name__ == found["processor_class"]
    assert len(tokenizer) == found["tokens"]
    ids = {**found["special"], **found.get("added", {})}
    assert tokenizer.convert_tokens_to_ids(list(ids)) == list(ids.values())
    for token, index in ids.items():
        assert tokenizer(f"a {token}b", add_special_tokens=False).input_ids.count(index) == 1
    assert tokenizer.eos_token == found["roles"]["eos"]
    assert tokenizer.pad_token == found["roles"]["pad"]
    assert tokenizer.bos_token == found["roles"].get("bos")
    assert processor.image_token == found["roles"]["image"]
    wanted = found["image_processor"]
    assert type(images).__name__ == wanted["image_processor_type"].removesuffix("Fast")
    assert list(images.image_mean) == wanted["image_mean"]
    if "min_pixels" in wanted:
        assert images.size["shortest_edge"] == wanted["min_pixels"]
        assert images.size["longest_edge"] == wanted["max_pixels"]
    else:
        assert dict(images.size) == wanted["size"]
    if "pinpoint_edges" in wanted:
        assert len(images.image_grid_pinpoints) == 36


@pytest.mark.parametrize("preset", HUB)
def test_a_preset_fits_the_smallest_student_of_its_family(preset, plain, processors):
    names = preset, SMALLEST[facts(preset)["family"]]
    teacher, student = (build(name, plain, weights=False) for name in names)
    assert fingerprints(processors[names[0]]) == fingerprints(processors[names[1]])
    heads = [
        Vocabulary(read_vocab_rows(str(path)), len(processors[name].tokenizer))
        for name, path in zip(names, (teacher, student), strict=True)
    ]
    assert heads[0].rows == facts(preset)["head_rows"]
    assert shared_rows(*heads) == facts(preset)["tokens"]
    shape = read_shape(str(teacher))
    assert (shape.model_type, shape.image_token_id) == (
        facts(preset)["model_type"],
        facts(preset)["special"][facts(preset)["roles"]["image"]],
    )


@pytest.mark.parametrize("preset", HUB)
def test_a_directory_has_the_family_of_its_preset(preset, plain):
    directory = build(preset, plain, weights=False)
    assert resolve_model(str(directory)).family == PRESETS[preset].family


@pytest.mark.parametrize("preset", ["0.5b", "llava-1.5-7b"])
def test_files_of_early_revisions_are_refused_with_what_to_add(preset, plain, tmp_path):
    """Before processor_config.json was there, nothing said how many positions an image takes."""
    directory = shutil.copytree(build(preset, plain, weights=False), tmp_path / "early")
    settings = json.loads((directory / "processor_config.json").read_text())
    (directory / "processor_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"positions of an image cannot be counted.*processor_config\.json"
    ) as said:
        load_processor(str(directory))
    advice = json.loads(str(said.value).partition("such as ")[2])
    assert advice.items() <= settings.items()
    (directory / "processor_config.json").write_text(json.dumps(advice))
    load_processor(str(directory))


SIZES = [(336, 336), (640, 480), (1920, 1080)]
PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


def test_the_page_says_of_every_preset_what_its_files_say(processors, plain):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    wanted = []
    for preset in HUB:
        found = facts(preset)
        counts = [image_layout(processors[preset], *reversed(size)).num_positions for size in SIZES]
        tied = found.get("text_tie_word_embeddings", found.get("tie_word_embeddings"))
        cells = [
            f"`{preset}`",
            PRESETS[preset].source,
            f"{read_vocab_rows(str(plain / preset)):,}",
            f"{len(processors[preset].tokenizer):,}",
            "tied" if tied else "own",
            found["dtype"],
            ", ".join(f"{count:,}" for count in counts),
        ]
        wanted.append(f"| {' | '.join(cells)} |")
    assert rows == wanted
