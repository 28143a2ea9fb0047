"""A dump without `--out` finds its own level: the first free one, or the one it was stopped in."""

from common.cache.writer import CacheWriter
from teacher_dump.level import choose_out
from tests.common.cache.records import make_manifest


def test_levels_are_taken_in_order_and_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (make_manifest(num_samples=number) for number in (3, 4))
    assert choose_out("auto", first) == "./zarr/l1"
    CacheWriter.open(choose_out("auto", first), first)
    assert choose_out("auto", first) == "./zarr/l1"
    assert choose_out("auto", second) == "./zarr/l2"
    CacheWriter.open(choose_out("auto", second), second)
    assert choose_out("auto", second) == "./zarr/l2"
    assert choose_out("auto", None) == "./zarr/l3"


def test_a_named_place_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_out("elsewhere/x", make_manifest(num_samples=1)) == "elsewhere/x"
