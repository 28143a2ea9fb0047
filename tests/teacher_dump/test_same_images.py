"""A file that is replaced while its level is dumped is named; inline images are named by their bytes."""

import base64
import json
from pathlib import Path

import pytest

from common.data.open import open_source
from common.errors import DataError
from common.models import TINY
from common.processor import load_processor
from schemas.manifest import Quarantined
from scripts.plain_dump import dump_plain
from teacher_dump.image_sizes import measure_sizes, read_size
from teacher_dump.prompts import Prepared, Preparer
from teacher_dump.same_images import check_sealed_images
from tests.teacher_dump.examples import picture

MODEL = str(TINY / "tiny-l1")


def write(directory: Path, images: list[object]) -> Path:
    """A data file with one question on each image."""
    talk = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a dog."}]
    entries = [{"id": f"s{i}", "image": each, "conversations": talk} for i, each in enumerate(images)]
    file = directory / "train.json"
    file.write_text(json.dumps(entries))
    return file


def inline(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(seed, 40, 50)).decode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six samples on three files."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number, 40, 50))
    return write(tmp_path, [f"{number // 2}.png" for number in range(6)])


def test_a_file_replaced_within_a_run_makes_the_later_sample_unusable(data: Path):
    preparer = Preparer(open_source(str(data)), load_processor(MODEL), max_len=512)
    assert isinstance(preparer(0), Prepared)
    (data.parent / "0.png").write_bytes(picture(9, 40, 50))
    found = preparer(1)
    assert isinstance(found, Quarantined)
    assert found.reason == "image-changed"
    assert "0.png has sha256" in found.detail
    assert "for sample s1" in found.detail
    assert "for s0" in found.detail
    assert isinstance(preparer(2), Prepared), "other files are not concerned"


@pytest.mark.parametrize("replaced", ["0.png", "1.png", "2.png"])
def test_a_file_replaced_between_runs_is_refused_with_both_hashes(replaced: str, data: Path):
    source = open_source(str(data))
    cache = dump_plain(MODEL, source, data.parent / "l1", part_samples=2)
    check_sealed_images(str(cache), source)
    (data.parent / replaced).write_bytes(picture(9, 40, 50))
    with pytest.raises(
        DataError, match=rf"{replaced} of sample s\d has sha256 .* replaced since; restore it"
    ):
        check_sealed_images(str(cache), source)


def test_a_missing_file_does_not_stop_a_resumed_dump(data: Path):
    source = open_source(str(data))
    cache = dump_plain(MODEL, source, data.parent / "l1", part_samples=2)
    (data.parent / "0.png").unlink()
    check_sealed_images(str(cache), source)


def test_inline_images_with_other_bytes_are_other_images(tmp_path: Path):
    named = [{"bytes": None, "path": inline(seed)} for seed in (0, 0, 1)]
    source = open_source(str(write(tmp_path, named)))
    keys = source.image_keys().tolist()
    assert keys[0] == keys[1] != keys[2]
    preparer = Preparer(source, load_processor(MODEL), max_len=512)
    first, same, other = (preparer(index).prompt.images[0] for index in range(3))
    assert first.sha256 == same.sha256 != other.sha256
    assert first.key == same.key != other.key


def test_inline_bytes_that_change_are_other_data(tmp_path: Path):
    before = open_source(str(write(tmp_path, [inline(0)]))).fingerprint()
    assert open_source(str(write(tmp_path, [inline(1)]))).fingerprint() != before


def test_two_rows_of_a_data_set_under_one_file_name_are_two_images(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    talk = [[{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog."}]] * 2
    images = [{"bytes": picture(seed, 40, 50), "path": "a.png"} for seed in range(2)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": images}, features=features)
    rows.add_column("conversations", talk).save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    assert len(set(source.image_keys().tolist())) == 2
    preparer = Preparer(source, load_processor(MODEL), max_len=512)
    assert len({preparer(index).prompt.images[0].sha256 for index in range(2)}) == 2


def test_sizes_are_read_upright_from_headers(tmp_path: Path, data: Path):
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "turned.jpg", exif=turned)
    source = open_source(str(write(tmp_path, ["turned.jpg", "0.png", "nowhere.png"])))
    assert read_size(source[0].images[0], source.image_root) == (60, 20)
    assert read_size(source[1].images[0], source.image_root) == (40, 50)
    with pytest.raises(DataError, match="nowhere"):
        read_size(source[2].images[0], source.image_root)


def test_positions_are_counted_over_all_images_that_can_be_read(tmp_path: Path):
    import numpy as np

    from tests.hub_settings import make_processor

    sizes = [(384, 384), (480, 640), (960, 1280)]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(picture(number, *size))
    (tmp_path / "cut.png").write_bytes(b"no image")
    source = open_source(str(write(tmp_path, ["0.png", "1.png", "2.png", "cut.png"])))
    found = measure_sizes(make_processor("llava_onevision"), source, np.arange(4))
    assert (found.images, found.largest) == (3, 7309)
    assert found.mean == pytest.approx((1485 + 2929 + 7309) / 3)
    assert found.per_sample == 1
    assert measure_sizes(make_processor("llava_onevision"), source, np.array([3])) is None
