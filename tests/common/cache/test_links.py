"""What a symbolic link in a cache points to is never read, written or removed."""

import os
import shutil

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.store import LocalStore
from common.cache.verify import repair, verify
from common.cache.writer import CacheWriter
from common.errors import CacheError
from tests.common.cache.records import make_manifest, make_records


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "l1"
    writer = CacheWriter.open(str(path), make_manifest())
    for part in range(2):
        records = make_records(np.random.default_rng(part), 3, first=3 * part)
        writer.write_part(part, records, first_sample=3 * part, num_samples=3)
    writer.finalize()
    return path


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    (tmp_path / "home" / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "home" / "zarr.json").write_text("{}")
    return tmp_path / "home"


def contents(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


@pytest.mark.parametrize("name", [".writing", "parts", "seals", "index", "seals/00000"])
def test_repair_leaves_what_a_link_points_to(cache, home, name):
    shutil.rmtree(cache / name, ignore_errors=True)
    (cache / name).symlink_to(home)
    before, files = contents(home), contents(cache)
    report = verify(str(cache))
    assert not report.ok
    assert ("link", name) in [(p.kind, p.path) for p in report.problems]
    with pytest.raises(CacheError, match="symbolic link"):
        repair(report)
    assert contents(home) == before
    assert contents(cache) == files
    (cache / name).unlink()
    repair(verify(str(cache)))
    assert contents(home) == before


def test_a_linked_part_is_bad_and_goes_without_its_target(cache, tmp_path):
    directory = cache / "parts" / read_seal(cache, 0).directory
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    report = verify(str(cache))
    assert report.bad_parts == [0]
    with pytest.raises(CacheError, match="symbolic link"):
        CacheReader(str(cache)).read_record("sample-0")
    assert repair(report) == [0]
    assert not directory.is_symlink()
    assert contents(tmp_path / "elsewhere") == before


def test_a_linked_directory_inside_a_part_is_found(cache, home):
    directory = cache / "parts" / read_seal(cache, 1).directory
    (directory / "stray").symlink_to(home)
    report = verify(str(cache))
    assert report.bad_parts == [1]
    before = contents(home)
    assert repair(report) == [1]
    assert contents(home) == before
    assert not directory.exists()


@pytest.mark.parametrize("name", [".writing", "seals", "parts"])
def test_writing_does_not_follow_a_link(cache, home, name):
    shutil.rmtree(cache / name, ignore_errors=True)
    (cache / name).symlink_to(home)
    before = contents(home)
    with pytest.raises(CacheError, match="symbolic link"):
        CacheWriter(LocalStore(cache), make_manifest()).write_part(
            0, make_records(np.random.default_rng(0), 3), first_sample=0, num_samples=3
        )
    assert contents(home) == before


def test_a_linked_root_is_a_cache(cache, tmp_path):
    (tmp_path / "alias").symlink_to(cache)
    assert verify(str(tmp_path / "alias")).ok
    assert CacheReader(str(tmp_path / "alias")).num_samples == 6


def test_a_pipe_is_refused_and_does_not_block(cache):
    path = cache / "parts" / read_seal(cache, 0).directory / "zarr.json"
    path.unlink()
    os.mkfifo(path)
    assert verify(str(cache)).bad_parts == [0]
    with pytest.raises(CacheError, match="regular file"):
        CacheReader(str(cache)).read_record("sample-0")
