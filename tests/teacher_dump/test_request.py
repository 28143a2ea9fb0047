"""Requests and results survive the channel to another process; random rows depend on seed and image alone."""

import dataclasses
import pickle

import numpy as np
import pytest

from common.chat import ImageSpan
from common.errors import CacheError, ConfigError
from schemas.manifest import Capture
from teacher_dump.config import DumpConfig
from teacher_dump.cost import Measure, check_disk, estimate, with_sizes
from teacher_dump.engine import check_arguments
from teacher_dump.image_sizes import ImageSizes
from teacher_dump.records import visual_rows
from teacher_dump.request import (
    Captured,
    CapturedImage,
    CapturedRows,
    CaptureRequest,
    ImageIdentity,
    hash_tokens,
)


def rows(count: int, topk: int) -> CapturedRows:
    draw = np.random.default_rng(count)
    floats = [draw.normal(size=(count, width)).astype(np.float32) for width in (topk, 2, 2)]
    return CapturedRows(draw.integers(0, 99, (count, topk), dtype=np.int32), *floats)


def assert_equal(found: object, wanted: object) -> None:
    if dataclasses.is_dataclass(wanted) and not isinstance(wanted, type):
        for field in dataclasses.fields(wanted):
            assert_equal(getattr(found, field.name), getattr(wanted, field.name))
    elif isinstance(wanted, dict):
        assert wanted.keys() == found.keys()  # type: ignore[attr-defined]
        for key, value in wanted.items():
            assert_equal(found[key], value)  # type: ignore[index]
    elif isinstance(wanted, tuple):
        for ours, theirs in zip(found, wanted, strict=True):  # type: ignore[call-overload]
            assert_equal(ours, theirs)
    elif isinstance(wanted, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.array_equal(found, wanted)
    else:
        assert found == wanted


def plain(value: object) -> bool:
    """Whether msgpack could carry it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (str, bytes, int, float, bool)


def test_a_request_survives_the_channel():
    request = CaptureRequest(
        "s",
        9,
        hash_tokens(np.arange(9, dtype=np.int32)),
        (ImageIdentity("a", 1, 4), ImageIdentity("b", 5, 6)),
        np.array([6, 7], np.int32),
        (np.array([1, 3], np.int32), None),
    )
    extra = request.to_extra()
    assert plain(extra)
    assert_equal(CaptureRequest.from_extra(extra), request)


@pytest.mark.parametrize(
    "result",
    [
        Captured("s", "no", "prompt-mismatch"),
        Captured("s", response=rows(3, 5)),
        Captured(
            "s",
            response=rows(0, 5),
            images={1: CapturedImage(rows(4, 2), None, np.ones((4, 2), np.float32), 0.5)},
        ),
        Captured("s", images={0: CapturedImage(None, np.ones((3, 7), np.float32), None, 0.0)}),
    ],
)
def test_a_result_survives_the_channel(result: Captured):
    wire = result.to_wire()
    assert plain(wire)
    assert_equal(Captured.from_wire(pickle.loads(pickle.dumps(wire))), result)


def test_token_hash_sees_order_and_length():
    ids = np.array([1, 2, 3], np.int32)
    assert hash_tokens(ids) == hash_tokens(ids.astype(np.int64).astype(np.int32)[::-1][::-1])
    assert len({hash_tokens(each) for each in (ids, ids[::-1], ids[:2])}) == 3


def capture(fraction: float, seed: int = 0) -> Capture:
    return Capture(topk=4, visual_topk=4, visual_fraction=fraction, seed=seed)


def image(key: str, start: int = 5, length: int = 100) -> ImageSpan:
    return ImageSpan(key * 32, "0" * 64, start, start + length, ())


def test_all_rows_by_default():
    assert visual_rows(image("a"), capture(1.0)).tolist() == list(range(5, 105))
    assert visual_rows(image("a"), capture(0.0)).tolist() == []
    assert len(visual_rows(image("a"), capture(0.001))) == 1


def test_random_rows_are_a_function_of_seed_and_image():
    first = visual_rows(image("a"), capture(0.25))
    assert len(first) == 25
    assert (np.diff(first) > 0).all()
    assert first.min() >= 5
    assert first.max() < 105
    assert first.tolist() == visual_rows(image("a"), capture(0.25)).tolist()
    assert first.tolist() != visual_rows(image("b"), capture(0.25)).tolist()
    assert first.tolist() != visual_rows(image("a"), capture(0.25, seed=1)).tolist()
    assert (visual_rows(image("a", start=9), capture(0.25)) - 4).tolist() == first.tolist()


def test_random_rows_cover_every_position_evenly():
    counts = np.zeros(20)
    for seed in range(600):
        counts[visual_rows(image("a", start=0, length=20), capture(0.25, seed=seed))] += 1
    assert abs(counts / 600 - 0.25).max() < 0.08


MEASURE = Measure(positions=800, response_rows=50, image_positions=729)


def size(**changes: object) -> int:
    config = DumpConfig.model_validate(changes)
    return estimate(config, MEASURE, samples=1000, images=300, hidden_size=3584, rate=None).size_bytes


def test_estimates_grow_with_what_is_kept():
    assert size(topk=64) > size(topk=64, visual_topk=16) > size(topk=16) > size(topk=16, positions="response")
    assert size(relation_store="both") > size(relation_store="hidden") > size() > size(relation_store="none")
    assert size(visual_fraction=0.25) < size()
    assert size(profile="portable") > size()


def test_sizes_of_many_images_replace_those_of_a_few_samples():
    few = Measure(positions=1000, response_rows=50, image_positions=400, images=2)
    found = with_sizes(few, ImageSizes(images=15, per_sample=1.5, mean=600, largest=900))
    assert (found.positions, found.image_positions, found.images) == (1000 - 2 * 400 + 1.5 * 600, 600, 1.5)


@pytest.mark.parametrize("name", ["mm_processor_kwargs", "mm-processor-kwargs"])
def test_processor_arguments_of_the_engine_are_not_the_users_to_set(name: str):
    config = DumpConfig(engine_arg=(f'{name}={{"size": 3}}',))
    with pytest.raises(ConfigError, match="use --max-pixels and --min-pixels"):
        check_arguments(config.engine_arguments)


def test_time_follows_the_rate():
    found = estimate(DumpConfig(), MEASURE, samples=10, images=3, hidden_size=64, rate=4000.0)
    assert found.positions == 8000
    assert found.seconds == 2.0


def test_a_full_disk_is_refused_before_the_start():
    plan = {"size_bytes": 2_000_000_000, "disk_free_bytes": 1_000_000_000}
    with pytest.raises(CacheError, match=r"needs about 2\.60 GB, the disk has 1\.00 GB free"):
        check_disk(DumpConfig(), plan)
    check_disk(DumpConfig(), {**plan, "disk_free_bytes": 3_000_000_000})
