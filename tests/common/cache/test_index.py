"""One index at a time, whoever writes it, and no trace of those who came second."""

import shutil
import sys
import threading

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.store import LocalStore
from common.cache.verify import repair, verify
from common.cache.writer import CacheWriter
from common.errors import CacheError
from tests.common.cache.records import make_manifest, make_records
from tests.common.cache.test_verify import rewrite


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "l1"
    writer = CacheWriter.open(str(path), make_manifest())
    for part in range(2):
        records = make_records(np.random.default_rng(part), 3, first=3 * part)
        writer.write_part(part, records, first_sample=3 * part, num_samples=3)
    return path


def names(directory):
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def open_writer(path):
    return CacheWriter.open(str(path), make_manifest())


@pytest.mark.parametrize("stale", [False, True])
def test_concurrent_finalizes_leave_one_index(cache, stale):
    for _ in range(12):
        if stale:
            open_writer(cache).finalize()
            pointer = cache / "index" / "zarr.json"
            pointer.write_bytes(pointer.read_bytes().replace(b'"num_records": 6', b'"num_records": 5'))
        else:
            shutil.rmtree(cache / "index", ignore_errors=True)
        faults, barrier = [], threading.Barrier(3)

        def finalize(faults=faults, barrier=barrier):
            barrier.wait()
            try:
                open_writer(cache).finalize()
            except OSError as error:
                faults.append(error)

        threads = [threading.Thread(target=finalize) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        assert CacheReader(str(cache)).num_samples == 6
        report = verify(str(cache))
        assert report.ok
        assert stale or not report.problems
        assert len(names(cache / "index")) == 2 or stale
        assert not names(cache / ".writing")


def test_a_whole_index_is_kept(cache):
    open_writer(cache).finalize()
    before = names(cache / "index")
    open_writer(cache).finalize()
    assert names(cache / "index") == before


def test_finalize_mends_a_damaged_index(cache):
    open_writer(cache).finalize()
    victim = next(cache.glob("index/*/samples/c.0.0"))
    victim.write_bytes(victim.read_bytes()[:-9] + b"123456789")
    assert [p.kind for p in verify(str(cache)).problems] == ["index"]
    with pytest.raises(CacheError, match="finalize"):
        CacheReader(str(cache))
    open_writer(cache).finalize()
    assert not verify(str(cache)).problems
    assert CacheReader(str(cache)).num_samples == 6


def test_an_abandoned_index_is_a_leftover(cache):
    open_writer(cache).finalize()
    (current,) = (p for p in (cache / "index").iterdir() if p.is_dir())
    shutil.copytree(current, cache / "index" / "00000-abcdefabcdef")
    report = verify(str(cache))
    assert report.ok
    assert [(p.kind, p.path) for p in report.problems] == [("unsealed", "index/00000-abcdefabcdef")]
    repair(report)
    assert not verify(str(cache)).problems
    assert current.is_dir()


@pytest.mark.parametrize("name", ["../parts", "..", "", None, 7, ["a"]])
def test_the_index_names_no_directory_elsewhere(cache, name):
    open_writer(cache).finalize()
    rewrite(cache / "index" / "zarr.json", lambda attributes: attributes.update(directory=name))
    assert not verify(str(cache)).ok
    with pytest.raises(CacheError, match="finalize"):
        CacheReader(str(cache))


def test_a_working_directory_is_there_however_others_tidy(tmp_path):
    store, faults = LocalStore(tmp_path), []

    def come_and_go():
        for _ in range(500):
            try:
                store.working()
            except OSError as error:
                faults.append(error)
            store.tidy()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert faults == []
