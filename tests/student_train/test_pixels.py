import shutil
from dataclasses import replace

import pytest
import torch

from common.cache.reader import CacheReader
from common.data.open import open_source
from common.errors import DataError, MismatchError
from common.processor import load_processor
from student_train.pixels import PixelLoader, Pixels, join, preprocess
from tests.student_train.conftest import STUDENT


@pytest.fixture(scope="module")
def processor():
    return load_processor(STUDENT)


@pytest.fixture(scope="module")
def records(cache):
    reader = CacheReader(str(cache))
    return [reader.read_record(index) for index in range(8)]


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the data that a test may spoil."""
    shutil.copytree(shapes.parent, tmp_path / "data")
    return tmp_path / "data" / shapes.name


def loader(path, processor, keep_bytes=1 << 24):
    return PixelLoader(open_source(str(path)), processor, keep_bytes=keep_bytes)


def test_pixels_are_the_processors(shapes, processor, records):
    found = loader(shapes, processor).load(records[0])
    assert found.num_tokens == (36,)
    assert found.tensors["pixel_values"].shape == (1, 3, 48, 48)
    assert set(found.tensors) == {"pixel_values"}


def test_samples_of_one_image_share_pixels(shapes, processor, records):
    pixels = loader(shapes, processor)
    same = [r for r in records if r.visual[0].image_sha256 == records[0].visual[0].image_sha256]
    assert len(same) == 2
    assert pixels.load(same[0]) is pixels.load(same[1])
    forgetful = loader(shapes, processor, keep_bytes=0)
    assert forgetful.load(same[0]).tensors["pixel_values"].equal(pixels.load(same[0]).tensors["pixel_values"])


def test_a_changed_image_is_refused_by_name(copied, processor, records):
    source = open_source(str(copied))
    images = sorted((copied.parent / "images").rglob("*.png"))
    shutil.copy(images[5], images[0])
    victim = next(
        r
        for r in records
        if source[list(source.sample_ids()).index(r.sample_id)].images[0].path.endswith("000000.png")
    )
    with pytest.raises(
        MismatchError, match=rf"{victim.sample_id}.*000000\.png.*has sha256 .* the teacher saw"
    ):
        loader(copied, processor).load(victim)


def test_a_missing_image_is_refused_by_name(copied, processor, records):
    for image in (copied.parent / "images").rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"\.png does not exist"):
        loader(copied, processor).load(records[0])


def test_a_sample_that_the_data_lacks_is_refused(shapes, processor, records):
    with pytest.raises(DataError, match="'nobody' is in the cache but not in the data"):
        loader(shapes, processor).load(replace(records[0], sample_id="nobody"))


def test_another_number_of_positions_is_refused(shapes, processor, records):
    visual = replace(records[0].visual[0], num_positions=35)
    with pytest.raises(MismatchError, match=r"gives its images \(36,\) positions, the cache has \(35,\)"):
        loader(shapes, processor).load(replace(records[0], visual=(visual,)))


def test_text_only_samples_have_no_pixels(shapes, processor, records):
    spans = tuple(span for span in records[0].spans if span.kind != "image")
    assert loader(shapes, processor).load(replace(records[0], visual=(), spans=spans)) is None


def test_image_positions_without_a_named_image_are_refused(shapes, processor, records):
    with pytest.raises(MismatchError, match="has 1 image spans, the cache names 0 images"):
        loader(shapes, processor).load(replace(records[0], visual=()))


def test_several_images_are_counted_apart(processor):
    from PIL import Image

    images = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    found = preprocess(processor, images)
    assert found.num_tokens == (36, 36)
    assert found.tensors["pixel_values"].shape == (2, 3, 48, 48)


def test_ragged_crops_are_padded_with_zeros():
    few = Pixels({"pixel_values": torch.ones(1, 2, 3, 4, 4)}, (5,))
    many = Pixels({"pixel_values": torch.ones(1, 5, 3, 4, 4)}, (9,))
    joined = join([few, many])["pixel_values"]
    assert joined.shape == (2, 5, 3, 4, 4)
    assert joined[0, 2:].abs().sum() == 0
    assert joined[1].equal(torch.ones(5, 3, 4, 4))
    assert join([]) == {}
