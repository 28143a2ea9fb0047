"""Reading early, often and from several threads gives the same blocks; memory comes back and is bounded."""

import gc
import threading

import numpy as np
import pytest

from common.cache.buffers import BufferShelf
from common.cache.cli import main
from common.cache.prefetch import prefetch
from common.cache.reader import CacheReader
from common.errors import CacheError
from tests.common.cache.records import make_manifest, make_records
from tests.common.cache.test_round_trip import write_cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    records = make_records(np.random.default_rng(0), 24, questions=1)
    manifest = make_manifest(num_samples=24, part_samples=8)
    return write_cache(tmp_path_factory.mktemp("reading") / "l1", records, manifest, block_rows=30)


def contents(block):
    return {
        r.sample_id: (r.response.logprobs.copy(), r.visual[0].topk.token_ids.copy())
        for r in (block.record(i) for i in range(len(block)))
    }


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 2), (4, 7)])
def test_prefetch_keeps_the_order(path, threads, ahead):
    cache = CacheReader(path)
    numbers = np.random.default_rng(1).permutation(cache.num_blocks).tolist() * 2
    found = [block.sample_ids for block in prefetch(cache, numbers, threads=threads, ahead=ahead)]
    assert found == [cache.read_block(n).sample_ids for n in numbers]


def test_prefetch_can_be_left_early(path):
    cache = CacheReader(path)
    blocks = prefetch(cache, iter(lambda: 0, None), ahead=2)
    next(blocks)
    blocks.close()


def test_threads_read_the_same(path):
    cache = CacheReader(path)
    wanted = [contents(cache.read_block(b)) for b in range(cache.num_blocks)]
    wrong = []

    def work(seed):
        for block in np.random.default_rng(seed).integers(0, cache.num_blocks, 40).tolist():
            found = contents(cache.read_block(block))
            for name, (logprobs, ids) in wanted[block].items():
                if not (np.array_equal(found[name][0], logprobs) and np.array_equal(found[name][1], ids)):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_view_keeps_its_memory():
    shelf = BufferShelf()
    array = shelf.empty((64, 4096), np.float32)
    array[:] = 7
    view = array[3:5, 10:20].T
    del array
    gc.collect()
    other = shelf.empty((64, 4096), np.float32)
    other[:] = 1
    assert (view == 7).all()
    assert shelf.num_bytes == 0
    del view
    assert shelf.num_bytes > 0


def test_the_shelf_is_bounded():
    shelf = BufferShelf(max_bytes=1 << 20)
    arrays = [shelf.empty((1 << 18,), np.uint8) for _ in range(20)]
    arrays.clear()
    assert 0 < shelf.num_bytes <= 1 << 20


def test_blocks_out_of_range_and_unknown_samples(path):
    cache = CacheReader(path)
    with pytest.raises(IndexError):
        cache.read_block(cache.num_blocks)
    with pytest.raises(KeyError):
        cache.read_record("nobody")
    with pytest.raises(IndexError):
        cache.read_record(-1)


def test_a_path_without_a_cache(tmp_path):
    with pytest.raises(CacheError, match="not a cache"):
        CacheReader(str(tmp_path))


def test_commands_and_their_exit_codes(path, tmp_path, capsys):
    assert main(["info", path]) == 0
    assert "records: 24" in capsys.readouterr().out
    assert main(["verify", path, "--json"]) == 0
    assert main(["merge", str(tmp_path / "merged"), path]) == 0
    assert main(["finalize", str(tmp_path / "merged")]) == 0
    victim = next((tmp_path / "merged" / "parts").glob("00001-*")) / "sample_text" / "c.0.0"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["verify", str(tmp_path / "merged")]) == 1
    assert "cascache repair" in capsys.readouterr().out
    assert main(["repair", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "merged"), "--quick"]) == 1, "what lacks a part is not all well"
    text = capsys.readouterr().out
    assert "complete: False" in text
    assert "names and sizes only" in text
    assert main(["finalize", str(tmp_path / "merged")]) == 2
    assert "lacks 1 of 3 parts" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "nowhere")]) == 2
