"""The area of images is bounded as asked, as the level says, or by default; the model's own bound is kept."""

import itertools
import json
from pathlib import Path

import pytest

from common.compat import require_images
from common.errors import ConfigError, MismatchError
from common.fingerprint import fingerprints
from common.grids import image_layout
from common.image_settings import image_settings
from common.pixels import PixelBounds, apply_pixels, bounds_in, pixels_note, read_bounds, set_bounds
from common.processor import ProcessorOptions, load_processor
from common.settings import load_settings
from schemas.manifest import Capture, Manifest, SampleSet, TeacherIdentity
from student_train.config import EvalConfig, TrainConfig
from teacher_dump.config import AuditConfig, DumpConfig
from tests.hub_settings import make_processor

BOUNDED = {"qwen2_vl": 784, "qwen2_5_vl": 784, "qwen3_vl": 1024}
"""Families with bounds, and the pixels of one position."""
UNBOUNDED = {
    "llava_1_5": "crop_size",
    "llava_onevision": "image_grid_pinpoints = 36 shapes from \\[384, 384\\] to \\[2304, 2304\\]",
    "internvl": "max_patches = 12",
}


def bound(processor, least=None, most=None, level=None, default=True):
    apply_pixels(processor, least=least, most=most, level=level, default=default)
    return processor


def save(family: str, directory: Path) -> str:
    """A directory with the processor of a hub checkpoint."""
    make_processor(family).save_pretrained(directory)
    return str(directory)


def level_of(processor) -> Manifest:
    return Manifest(
        teacher=TeacherIdentity(model="m", weights_sha256="0" * 64, model_type="t", dtype="float32"),
        fingerprints=fingerprints(processor),
        image_settings=image_settings(processor),
        vocab_rows=448,
        vocab_size=440,
        hidden_size=128,
        samples=SampleSet(fingerprint="0" * 64, num_samples=1),
        capture=Capture(topk=8, visual_topk=8),
        part_samples=1,
    )


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("1003520", 1003520),
        ("1,003,520", 1003520),
        ("1_003_520", 1003520),
        ("1.3MP", 1_300_000),
        ("1mp", 1_000_000),
        (".5 MP", 500_000),
        (" 2MP ", 2_000_000),
    ],
)
@pytest.mark.parametrize("command", [DumpConfig, AuditConfig, TrainConfig])
def test_every_command_takes_pixels_in_numbers_and_in_megapixels(command, text: str, pixels: int):
    found = load_settings(command, ["--max-pixels", text, "--min-pixels", text], prog="p")
    assert (found.max_pixels, found.min_pixels) == (pixels, pixels)
    assert command.model_validate_json(found.model_dump_json(by_alias=True)) == found


def test_eval_takes_pixels():
    found = load_settings(EvalConfig, ["--model", "m", "--data", "d", "--max-pixels", "1MP"], prog="p")
    assert found.max_pixels == 1_000_000


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "1.5", "1e6", "0MP", "1MB", "many", "1" * 20, "1,3", "1,0000", ",1", "1,003,52", "1__0"],
)
def test_what_is_no_number_of_pixels_is_refused(text: str):
    with pytest.raises(ConfigError, match="--max-pixels"):
        load_settings(DumpConfig, [f"--max-pixels={text}"], prog="p")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "MP", "9" * 5000])
def test_a_number_of_hundreds_of_digits_is_refused_in_a_short_line(text: str):
    with pytest.raises(ConfigError, match=r"--max-pixels.*such as 1003520") as refused:
        load_settings(DumpConfig, [f"--max-pixels={text}"], prog="p")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(("family", "cell"), BOUNDED.items())
def test_by_default_an_image_takes_1280_positions_at_most(family: str, cell: int):
    processor = make_processor(family)
    own = read_bounds(processor)
    bound(processor)
    assert read_bounds(processor) == PixelBounds(own.least, 1280 * cell)
    assert 1e6 <= 1280 * cell <= 1.32e6
    for height, width in itertools.product((28, 300, 999, 4000), repeat=2):
        layout = image_layout(processor, height, width)
        assert layout.num_positions <= 1280
        features = processor.image_processor.get_number_of_image_patches(height, width)
        assert features // 4 == layout.num_positions
    note = pixels_note(processor)
    assert note == (
        f"images are scaled to at most {1280 * cell:,} pixels, 1,280 positions "
        f"(the model's own bounds are {own.least:,} to {own.most:,}); --max-pixels changes it"
    )


@pytest.mark.parametrize("family", BOUNDED)
def test_a_lower_bound_of_the_model_is_kept(family: str):
    processor = make_processor(family)
    processor.image_processor.size["longest_edge"] = 200_000
    bound(processor)
    assert read_bounds(processor).most == 200_000
    assert pixels_note(processor) is None
    assert set_bounds(processor) is None


@pytest.mark.parametrize("most", [70_000, 1_000_000, 5_000_000, 40_000_000])
@pytest.mark.parametrize("level", [None, PixelBounds(66_000, 300_000)])
def test_a_flag_wins_over_default_and_level(most: int, level: PixelBounds | None):
    processor = bound(make_processor("qwen3_vl"), most=most, level=level)
    assert read_bounds(processor).most == most
    assert read_bounds(processor).least == (65536 if level is None else 66_000)


def test_a_least_area_above_the_default_raises_the_default():
    assert read_bounds(bound(make_processor("qwen3_vl"), least=2_000_000)) == PixelBounds(
        2_000_000, 2_000_000
    )


@pytest.mark.parametrize(("family", "cell"), BOUNDED.items())
def test_less_than_one_position_is_refused_with_the_least(family: str, cell: int):
    with pytest.raises(ConfigError, match=f"--max-pixels {cell - 1} .* give at least {cell}$"):
        bound(make_processor(family), most=cell - 1)
    found = read_bounds(bound(make_processor(family), least=1, most=cell))
    assert found == PixelBounds(1, cell)
    assert image_layout(bound(make_processor(family), least=1, most=cell), 3000, 4000).num_positions == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"least": 9000, "most": 8000},
            "--min-pixels 9000 .as asked. is more than --max-pixels 8000 .as asked",
        ),
        (
            {"most": 40_000},
            "--min-pixels 65536 .the bound of model or cache. is more than --max-pixels 40000",
        ),
        ({"least": 20_000_000}, "--min-pixels 20000000 .as asked. is more than --max-pixels 16777216"),
    ],
)
def test_bounds_that_cross_are_refused(flags: dict[str, int], said: str):
    with pytest.raises(ConfigError, match=said):
        bound(make_processor("qwen3_vl"), **flags)


@pytest.mark.parametrize("flag", ["least", "most"])
@pytest.mark.parametrize(("family", "governs"), UNBOUNDED.items())
def test_families_without_bounds_refuse_flags_and_say_what_governs(family: str, governs: str, flag: str):
    name = {"least": "--min-pixels", "most": "--max-pixels"}[flag]
    with pytest.raises(
        ConfigError,
        match=f"{name} has no meaning for .*Processor: .*{governs}.* in processor_config.json or p",
    ):
        bound(make_processor(family), **{flag: 1_000_000})


@pytest.mark.parametrize("family", UNBOUNDED)
def test_families_without_bounds_are_left_as_they_are(family: str):
    processor = make_processor(family)
    before = image_settings(processor)
    bound(processor, level=PixelBounds(784, 1568))
    assert image_settings(processor) == before
    assert pixels_note(processor) is None


def test_plain_commands_fit_each_other(tmp_path: Path):
    hub = save("qwen2_5_vl", tmp_path / "hub")
    teacher, student = load_processor(hub), load_processor(hub)
    assert read_bounds(teacher).most == 1280 * 784
    assert fingerprints(teacher) == fingerprints(student)
    assert fingerprints(load_processor(hub, level=level_of(teacher))) == fingerprints(teacher)


@pytest.mark.parametrize("options", [{"max_pixels": 2_000_000}, {"max_pixels": 50_000, "min_pixels": 5000}])
def test_a_student_takes_the_bounds_of_its_level(options: dict[str, int], tmp_path: Path):
    hub = save("qwen2_5_vl", tmp_path / "hub")
    teacher = load_processor(hub, options=ProcessorOptions(**options))
    level = level_of(teacher)
    assert fingerprints(load_processor(hub, level=level)) == fingerprints(teacher)
    require_images("zarr/l1", level, load_processor(hub, level=level))
    with pytest.raises(MismatchError, match=rf"give --max-pixels {options['max_pixels']} --min-pixels"):
        require_images("zarr/l1", level, load_processor(hub))


@pytest.mark.parametrize("options", [{}, {"max_pixels": 2_000_000}, {"max_pixels": 784}])
def test_a_saved_student_keeps_its_bounds(options: dict[str, int], tmp_path: Path):
    trained = load_processor(
        save("qwen2_5_vl", tmp_path / "hub"), options=ProcessorOptions(min_pixels=700, **options)
    )
    trained.save_pretrained(tmp_path / "student")
    found = load_processor(str(tmp_path / "student"))
    assert read_bounds(found) == read_bounds(trained)
    assert fingerprints(found) == fingerprints(trained)
    assert pixels_note(found) == pixels_note(trained)
    config = json.loads((tmp_path / "student" / "processor_config.json").read_text())
    assert config["image_processor"]["size"] == read_bounds(trained).size
    hub = json.loads((tmp_path / "hub" / "processor_config.json").read_text())
    assert config["video_processor"] == hub["video_processor"], "flags are about images"


def test_a_level_that_names_no_bounds_leaves_the_models_own(tmp_path: Path):
    hub = save("qwen2_5_vl", tmp_path / "hub")
    level = level_of(load_processor(hub)).model_copy(update={"image_settings": {}})
    assert read_bounds(load_processor(hub, level=level)).most == 12845056


@pytest.mark.parametrize(
    "size",
    [
        None,
        5,
        "big",
        {},
        {"shortest_edge": 4},
        {"shortest_edge": "4", "longest_edge": 9},
        {"shortest_edge": 9, "longest_edge": 4},
        {"shortest_edge": -9, "longest_edge": 4},
        {"shortest_edge": 1 << 40, "longest_edge": 1 << 41},
    ],
)
def test_bounds_that_make_no_sense_in_a_manifest_are_none(size: object):
    assert bounds_in({"image_processor": {"size": size}}) is None
    assert bounds_in({"image_processor": size}) is None
