"""Two teams read a bucket through one bounded local copy while a writer still dumps the tail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.writer import CacheWriter
from tests.common.cache.records import assert_same_record, make_manifest, make_records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

ROOT = Path(__file__).parents[3]
PARTS = 4
FIRST = 2
COPY_BYTES = 40_000


def records_of(part):
    return make_records(np.random.default_rng(part), 3, first=3 * part)


def write(path, parts):
    manifest = make_manifest(num_samples=3 * PARTS, topk=4)
    cache = CacheWriter.open(path, manifest, block_rows=60)
    for part in parts:
        cache.write_part(part, records_of(part), first_sample=3 * part, num_samples=3)
        time.sleep(0.3)


def read_until_complete(path):
    """Read every record again and again; return how many were right, and how many parts each time."""
    truth = {record.sample_id: record for part in range(PARTS) for record in records_of(part)}
    seen, right, draw = [], 0, np.random.default_rng(os.getpid())
    while not seen or seen[-1] < PARTS:
        with CacheReader(path) as cache:
            for record in map(cache.read_record, draw.permutation(cache.num_samples).tolist()):
                assert_same_record(record, truth[record.sample_id], step=1 / 16)
                right += 1
            seen.append(cache.num_samples // 3)
    return right, *seen


def job(*arguments, copy):
    """This module in a process of its own."""
    environment = os.environ | {
        "CASCACHE_COPY": str(copy),
        "CASCACHE_COPY_BYTES": str(COPY_BYTES),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.common.cache.test_teams", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_teams_read_while_the_tail_is_dumped(bucket, tmp_path):
    path, copy = f"{bucket}/teams", tmp_path / "copy"
    write(path, range(FIRST))
    readers = [job("read", path, copy=copy) for _team in range(2) for _process in range(2)]
    writer = job("write", path, copy=copy)
    writer.communicate(timeout=120)
    assert writer.returncode == 0
    outputs = [reader.communicate(timeout=120)[0].split() for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 4
    for right, *seen in outputs:
        assert [int(n) for n in seen] == sorted(int(n) for n in seen)
        assert int(seen[-1]) == PARTS
        assert int(right) == 3 * sum(int(n) for n in seen)
    assert any(int(seen[0]) < PARTS for _, *seen in outputs), "nobody read before the dump was done"
    held = sum(p.stat().st_size for p in copy.glob("??/*"))
    assert 0 < held <= COPY_BYTES * 1.5


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], range(FIRST, PARTS))
    else:
        sys.stdout.write(" ".join(map(str, read_until_complete(sys.argv[2]))))
