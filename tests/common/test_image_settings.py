"""Every setting that changes pixels or positions changes the fingerprint; names and saving do not."""

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.compat import check_fit
from common.fingerprint import first_image_fingerprint, image_processor_fingerprint
from common.image_settings import image_settings
from common.processor import load_processor
from tests import hub_settings
from tests.common.test_pixels import level_of
from tests.tiny_families import make_tokenizer

CLASSES = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    "SiglipImageProcessor": {"size": {"height": 56, "width": 56}},
    "LlavaImageProcessor": {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    "LlavaNextImageProcessor": {
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
    "LlavaOnevisionImageProcessor": {
        "size": {"height": 56, "width": 56},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    },
    "Qwen2VLImageProcessor": {"size": {"shortest_edge": 784, "longest_edge": 7840}},
    "GotOcr2ImageProcessor": {"size": {"height": 56, "width": 56}, "crop_to_patches": True},
    "Gemma3ImageProcessor": {
        "size": {"height": 56, "width": 56},
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 1.0,
    },
    "Idefics3ImageProcessor": {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}},
    "SmolVLMImageProcessor": {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}},
    "PixtralImageProcessor": {"size": {"longest_edge": 64}},
    "Idefics2ImageProcessor": {"size": {"shortest_edge": 30, "longest_edge": 60}, "do_image_splitting": True},
    "Phi4MultimodalImageProcessor": {},
}
"""Real image processors of transformers, at sizes that keep the test fast."""


class Bare:
    """As much of a processor as the settings need."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


def make(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**{**CLASSES[name], **changes})


def picture() -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (90, 130, 4), dtype=np.uint8), "RGBA").convert("RGB")


def outputs(images: Any) -> dict[str, Any] | str:
    """What comes out for a picture, or the error."""
    try:
        found = images(picture(), return_tensors="pt")
    except Exception as error:  # noqa: BLE001  a refusal is an outcome, too
        return type(error).__name__
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def same(ours: dict[str, Any] | str, theirs: dict[str, Any] | str) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours == theirs
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def other_values(value: Any) -> Iterator[Any]:
    """Values of the same kind."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2)
    elif isinstance(value, float):
        yield from (value * 2, value + 0.25)
    elif isinstance(value, dict):
        for key, size in value.items():
            if isinstance(size, int):
                yield {**value, key: size * 2}
    elif isinstance(value, list | tuple) and value:
        yield list(value[:-1])
        for each in other_values(value[0]):
            yield [each, *value[1:]]


def changed(images: Any) -> Iterator[tuple[str, Any]]:
    """Copies of an image processor with one setting changed, those that `to_dict` leaves out included."""
    for name in sorted({*images.to_dict(), *images.valid_kwargs.__annotations__, "image_seq_length"}):
        if name in ("return_tensors", "device", "data_format", "input_data_format", "disable_grouping"):
            continue
        value = getattr(images, name, None)
        value = dict(value) if type(value).__name__ == "SizeDict" else value
        for other in [True, 7] if value is None else other_values(value):
            settings = {**images.to_dict(), name: other}
            try:
                yield f"{name} = {other}", type(images)(**settings)
            except (TypeError, ValueError):
                continue


@pytest.mark.parametrize("name", CLASSES)
def test_whatever_changes_the_pixels_changes_the_fingerprint(name: str):
    images = make(name)
    before, mark = outputs(images), image_processor_fingerprint(Bare(images))
    assert not isinstance(before, str)
    mattered = [
        (said, image_processor_fingerprint(Bare(other)) != mark)
        for said, other in changed(images)
        if not same(before, outputs(other))
    ]
    assert len(mattered) >= 5
    assert [said for said, seen in mattered if not seen] == []


@pytest.mark.parametrize("name", CLASSES)
def test_saving_and_loading_keep_the_fingerprint(name: str, tmp_path: Path):
    images = make(name)
    images.save_pretrained(tmp_path)
    again = type(images).from_pretrained(tmp_path)
    assert image_processor_fingerprint(Bare(again)) == image_processor_fingerprint(Bare(images))


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("Phi4")])
def test_the_back_end_counts_and_settings_do_not_depend_on_it(name: str):
    images = make(name)
    module = type(images).__module__.replace("image_processing_", "image_processing_pil_")
    other = getattr(importlib.import_module(module), f"{name}Pil")(**CLASSES[name])
    ours, theirs = image_settings(Bare(images)), image_settings(Bare(other))
    assert (ours.pop("back_end"), theirs.pop("back_end")) == ("torchvision", "pil")
    assert ours == theirs


def test_back_ends_give_other_pixels():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ours = make("Qwen2VLImageProcessor")(picture(), return_tensors="pt")
    theirs = Qwen2VLImageProcessorPil(**CLASSES["Qwen2VLImageProcessor"])(picture(), return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert not torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("family", hub_settings.FAMILIES)
def test_token_counts_of_the_processor_count(family: str):
    processor = hub_settings.make_processor(family)
    mark = image_processor_fingerprint(processor)
    for name in hub_settings.PROCESSOR_SETTINGS.get(family, {}):
        other = copy.copy(processor)
        value = getattr(processor, name)
        setattr(other, name, value + 1 if isinstance(value, int) else f"not {value}")
        assert image_processor_fingerprint(other) != mark, name


@pytest.mark.parametrize("change", [{"max_patches": 4}, {"min_patches": 2}, {"crop_to_patches": True}])
def test_four_tiles_are_not_twelve(change: dict[str, Any]):
    processor = hub_settings.make_processor("internvl")
    mark, first = image_processor_fingerprint(processor), first_image_fingerprint(processor)
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    assert image_processor_fingerprint(processor) != mark
    assert first_image_fingerprint(processor) == first, "what caches of the first days did not see"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("processor_class", "AnotherProcessor"),
        ("auto_map", {"AutoImageProcessor": "code.Mine"}),
        ("return_tensors", "pt"),
        ("device", "cpu"),
        ("data_format", "channels_last"),
        ("disable_grouping", True),
        ("do_something_new", None),
        ("_private", 3),
    ],
)
def test_names_and_nothing_do_not_count(name: str, value: object):
    processor = hub_settings.make_processor("qwen2_5_vl")
    mark = image_processor_fingerprint(processor)
    setattr(processor.image_processor, name, value)
    assert image_processor_fingerprint(processor) == mark


def test_what_nobody_knows_counts():
    processor = hub_settings.make_processor("qwen2_5_vl")
    mark = image_processor_fingerprint(processor)
    processor.image_processor.do_something_new = True
    assert image_processor_fingerprint(processor) != mark


def test_another_tokenizer_is_not_another_image_processor():
    processor = hub_settings.make_processor("internvl")
    mark = image_processor_fingerprint(processor)
    processor.image_token_id += 1
    processor.tokenizer = make_tokenizer()
    assert image_processor_fingerprint(processor) == mark


def fit_of(manifest: Any, processor: Any, **options: bool) -> Any:
    fit = check_fit(manifest, processor, vocab_rows=448, **options)
    return next(each for each in fit.fields if each.name == "image processor")


def test_differing_settings_are_named_with_both_values():
    processor = hub_settings.make_processor("internvl")
    level = level_of(processor)
    processor.image_processor.max_patches = 4
    processor.image_seq_length = 64
    found = fit_of(level, processor)
    assert found.verdict == "does not fit"
    assert "max_patches is 12 in the cache, 4 here" in found.note
    assert "processor.image_seq_length is 256 in the cache, 64 here" in found.note
    assert fit_of(level, processor, own_grid=True).verdict == "fits with a note"


def test_what_a_hostile_cache_says_does_not_reach_the_terminal():
    processor = hub_settings.make_processor("internvl")
    level = level_of(processor)
    marks = level.fingerprints.model_copy(update={"image_processor": "0" * 64})
    said = {**level.image_settings, "a\x1b[2Jb" * 99: "c\x07d" * 99}
    note = fit_of(level.model_copy(update={"fingerprints": marks, "image_settings": said}), processor).note
    assert note.isprintable()
    assert len(note) < 300


def test_the_fingerprint_is_the_hash_of_what_the_manifest_lists():
    import hashlib
    import json

    for family in hub_settings.FAMILIES:
        level = level_of(hub_settings.make_processor(family))
        listed = json.loads(level.model_dump_json())["image_settings"]
        text = json.dumps(listed, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == level.fingerprints.image_processor


def test_another_back_end_is_named():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = hub_settings.make_processor("qwen2_vl")
    level = level_of(processor)
    processor.image_processor = Qwen2VLImageProcessorPil(**hub_settings.IMAGE_SETTINGS["qwen2_vl"])
    found = fit_of(level, processor)
    assert found.verdict == "does not fit"
    assert "back_end is torchvision in the cache, pil here" in found.note
    assert "install torchvision" in found.note


def test_a_cache_of_the_first_days_fits_with_a_note_by_what_it_covers():
    processor = hub_settings.make_processor("internvl")
    level = level_of(processor)
    marks = level.fingerprints.model_copy(update={"image_processor": first_image_fingerprint(processor)})
    first = level.model_copy(update={"fingerprints": marks, "image_settings": {}})
    assert fit_of(first, processor).verdict == "fits with a note"
    assert "number of tiles" in fit_of(first, processor).note
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert fit_of(first, processor).verdict == "does not fit"


def test_a_new_cache_never_fits_by_the_old_fingerprint():
    processor = hub_settings.make_processor("internvl")
    level = level_of(processor)
    marks = level.fingerprints.model_copy(update={"image_processor": first_image_fingerprint(processor)})
    assert fit_of(level.model_copy(update={"fingerprints": marks}), processor).verdict == "does not fit"


def test_the_shipped_presets_fit_each_other():
    from common.models import resolve_model

    marks = {
        image_processor_fingerprint(load_processor(resolve_model(name).path_or_id))
        for name in ("tiny", "tiny-l1", "tiny-student")
    }
    assert len(marks) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_their_names_and_equal_themselves(value: float):
    name, changes = "Qwen2VLImageProcessor", {"image_mean": [value, 0.5, 0.5]}
    first, second = (Bare(make(name, **changes)) for _ in range(2))
    assert image_settings(first)["image_processor"]["image_mean"] == [str(value), 0.5, 0.5]
    assert image_processor_fingerprint(first) == image_processor_fingerprint(second)
