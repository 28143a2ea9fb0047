"""A student sees images at the bounds of its level, whatever its own model's are."""

import shutil

import pytest

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.errors import MismatchError
from common.pixels import PixelBounds, read_bounds
from common.processor import ProcessorOptions, load_processor
from scripts.plain_dump import dump_plain
from student_train.config import TrainConfig
from student_train.pixels import PixelLoader
from student_train.plan import load_own_processor, make_plan

BOUNDS = PixelBounds(1000, 3000)


@pytest.fixture(scope="module")
def level(tiny_family, tmp_path_factory) -> tuple[str, str]:
    """Directory of a cache dumped with other bounds than the model's, and of the model."""
    root, model = tmp_path_factory.mktemp("bounds"), tiny_family("qwen2_5_vl")
    shutil.copytree(model, root / "bounded")
    options = ProcessorOptions(min_pixels=BOUNDS.least, max_pixels=BOUNDS.most)
    load_processor(str(model), options=options).save_pretrained(root / "bounded")
    data = write_shapes(root / "data", num_images=3, seed=0, questions_per_image=1)
    return str(dump_plain(str(root / "bounded"), open_source(str(data)), root / "l1")), str(model)


def test_without_flags_the_cache_says_how_large_images_are(level):
    cache, model = level
    plan = make_plan(TrainConfig(cache=(cache,), student=model))
    assert read_bounds(plan.processor) == BOUNDS
    assert read_bounds(load_own_processor(plan.student, plan.config, plan.levels)) == BOUNDS
    assert any("at most 3,000 pixels" in note for note in plan.notes)
    reader, source = plan.levels[0].cache, plan.levels[0].source
    loader = PixelLoader(source, plan.processor, keep_bytes=0)
    for index in range(reader.num_samples):
        record = reader.read_record(index)
        assert loader.load(record).num_tokens == tuple(image.num_positions for image in record.visual)


def test_another_flag_is_refused_with_the_right_one(level):
    cache, model = level
    with pytest.raises(MismatchError, match="give --max-pixels 3000 --min-pixels 1000"):
        make_plan(TrainConfig(cache=(cache,), student=model, max_pixels=9000))


def test_a_grid_of_its_own_keeps_the_models_bounds(level):
    cache, model = level
    plan = make_plan(TrainConfig(cache=(cache,), student=model, image_grid="own"))
    assert read_bounds(plan.processor) == read_bounds(load_processor(model))
    assert any("size.longest_edge is 3000 in the cache" in note for note in plan.notes)
