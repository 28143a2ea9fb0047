"""Several processes may write the index at once: one of them wins, readers never see less."""

import multiprocessing

import numpy as np
import pytest

from common.cache.index import drop_index
from common.cache.places import open_store
from common.cache.reader import CacheReader
from common.cache.seals import read_manifest
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from tests.common.cache.records import make_manifest, make_records

FORK = multiprocessing.get_context("fork")
ROUNDS = 8
WRITERS = 3


@pytest.fixture
def cache(tmp_path):
    writer = CacheWriter.open(str(tmp_path / "l1"), make_manifest(), block_rows=30)
    for part in range(2):
        records = make_records(np.random.default_rng(part), 3, first=3 * part)
        writer.write_part(part, records, first_sample=3 * part, num_samples=3)
    return tmp_path / "l1"


def finalize(path, failures, together, *, first):
    try:
        for _ in range(ROUNDS):
            together.wait(30)
            if first:
                drop_index(open_store(path))
            together.wait(30)
            CacheWriter.open(path, read_manifest(path)).finalize()
            with CacheReader(path) as reader:
                assert reader.num_samples == 6
                assert reader.read_record("sample-4").sample_id == "sample-4"
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_finalize_by_several_processes_is_harmless(cache):
    failures, together = FORK.Queue(), FORK.Barrier(WRITERS)
    writers = [
        FORK.Process(target=finalize, args=(str(cache), failures, together), kwargs={"first": i == 0})
        for i in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS, failures.get(timeout=1)
    report = verify(str(cache))
    assert report.ok, report.problems
    assert report.num_records == 6
