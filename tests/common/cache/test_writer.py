"""Parts are whole or absent, whoever writes them, and one identity owns a cache."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from common.cache import layout
from common.cache.reader import CacheReader
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.shard import MAX_CHUNK_VALUES, Coding, encode_chunk
from common.cache.store import LocalStore, make_working
from common.cache.verify import repair, verify
from common.cache.writer import CacheWriter, group_blocks
from common.errors import CacheError, DataError, MismatchError, PartMissing
from schemas.manifest import Quarantined
from tests.common.cache.records import (
    assert_same_record,
    make_manifest,
    make_record,
    make_records,
    make_visual,
)


def records_of(part, count=3):
    return make_records(np.random.default_rng(part), count, first=part * count)


def write(cache, part, records=None):
    records = records_of(part) if records is None else records
    return cache.write_part(part, records, first_sample=part * 3, num_samples=len(records))


def test_a_level_of_no_samples_is_complete(tmp_path):
    manifest = make_manifest(num_samples=0)
    with CacheWriter.open(str(tmp_path / "l1"), manifest) as cache:
        cache.finalize()
    reader = CacheReader(str(tmp_path / "l1"))
    assert reader.complete
    assert (reader.num_samples, reader.num_blocks) == (0, 0)


def test_a_part_of_quarantined_samples_only(tmp_path):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest(num_samples=2, part_samples=2))
    bad = [Quarantined(sample_id=f"b{i}", reason="too-long", detail="5000 positions") for i in range(2)]
    cache.write_part(0, [], first_sample=0, num_samples=2, quarantined=bad)
    cache.finalize()
    assert verify(str(tmp_path / "l1")).ok
    assert CacheReader(str(tmp_path / "l1")).seals[0].quarantined == tuple(bad)


def test_resume_sees_what_is_sealed(tmp_path):
    path = str(tmp_path / "l1")
    write(CacheWriter.open(path, make_manifest()), 1)
    again = CacheWriter.open(path, make_manifest())
    assert again.sealed == {1}
    assert not CacheReader(path).complete
    with pytest.raises(PartMissing, match=r"lacks 1 of 2 parts \(\[0\]\)"):
        again.finalize()


def test_another_identity_is_refused_field_by_field(tmp_path):
    path = str(tmp_path / "l1")
    CacheWriter.open(path, make_manifest())
    with pytest.raises(MismatchError) as error:
        CacheWriter.open(path, make_manifest(topk=16, vocab_size=200))
    assert "capture.topk: found 8, wanted 16" in str(error.value)
    assert "vocab_size: found 300, wanted 200" in str(error.value)
    assert "teacher" not in str(error.value)


def test_tools_are_not_identity(tmp_path):
    path = str(tmp_path / "l1")
    CacheWriter.open(path, make_manifest(tools={"torch": "1"}))
    assert CacheWriter.open(path, make_manifest(tools={"torch": "2"})).manifest.tools == {"torch": "1"}


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(CacheError, match="not empty"):
        CacheWriter.open(str(tmp_path), make_manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_counts_must_add_up(tmp_path):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest())
    with pytest.raises(DataError, match="are not 5"):
        cache.write_part(0, records_of(0), first_sample=0, num_samples=5)
    with pytest.raises(DataError, match="twice"):
        cache.write_part(0, [records_of(0)[0]] * 2, first_sample=0, num_samples=2)
    with pytest.raises(DataError, match="outside"):
        write(cache, 7)
    assert not cache.sealed


def test_the_first_seal_wins(tmp_path):
    path = str(tmp_path / "l1")
    cache = CacheWriter.open(path, make_manifest())
    first = write(cache, 0)
    second = write(cache, 0, make_records(np.random.default_rng(9), 3))
    assert second == first
    assert sorted(p.name for p in (tmp_path / "l1" / "parts").iterdir()) == [first.directory, "zarr.json"]
    assert verify(path).ok


def test_many_writers_of_the_same_parts_agree(tmp_path):
    path, manifest = str(tmp_path / "l1"), make_manifest(num_samples=12)
    seals, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        cache = CacheWriter.open(path, manifest)
        seals.extend(write(cache, part) for part in range(4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seals) == 16
    assert len({seal.directory for seal in seals}) == 4
    report = verify(path)
    assert report.ok
    assert not report.problems
    with CacheReader(path) as cache:
        for part in range(4):
            for record in records_of(part):
                assert_same_record(cache.read_record(record.sample_id), record, step=1 / 16)


def crash_before(path, manifest, name):
    """A writer that dies at the named step."""
    from common.cache import store

    original = getattr(store.LocalStore, name)

    def die(self, *arguments):
        if name != "create" or arguments[0].startswith("seals/0"):
            import os

            os._exit(9)
        return original(self, *arguments)

    cache = CacheWriter.open(path, manifest)
    setattr(store.LocalStore, name, die)
    write(cache, 0)


@pytest.mark.parametrize("step", ["add", "create"])
def test_killed_before_the_seal_means_absent(tmp_path, step):
    path, manifest = str(tmp_path / "l1"), make_manifest()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=crash_before, args=(path, manifest, step))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert sealed_parts(tmp_path / "l1") == set()
    report = verify(path)
    assert report.ok
    assert {p.kind for p in report.problems} == {"unsealed"}
    assert repair(report) == [0, 1]
    assert not verify(path).problems
    cache = CacheWriter.open(path, manifest)
    write(cache, 0)
    write(cache, 1)
    cache.finalize()
    assert not verify(path).problems


def test_index_and_unsealed_tail(tmp_path):
    path = str(tmp_path / "l1")
    cache = CacheWriter.open(path, make_manifest())
    write(cache, 1)
    tail_only = CacheReader(path)
    write(cache, 0)
    cache.finalize()
    whole = CacheReader(path)
    assert tail_only.num_samples == 3
    assert [*whole.sample_ids] == [f"sample-{i}" for i in range(6)]
    assert whole.num_tokens.tolist() == [len(whole.read_record(i).token_ids) for i in range(6)]
    (tmp_path / "l1" / "index" / "zarr.json").unlink()
    without = CacheReader(path)
    assert without.sample_ids == whole.sample_ids
    assert np.array_equal(without.num_tokens, whole.num_tokens)
    assert np.array_equal(without.block_offsets, whole.block_offsets)


def test_a_sealed_part_after_the_index_is_found(tmp_path):
    path = str(tmp_path / "l1")
    cache = CacheWriter.open(path, make_manifest())
    write(cache, 0)
    write(cache, 1)
    cache.finalize()
    report = verify(path)
    seal = read_seal(tmp_path / "l1", 1)
    victim = tmp_path / "l1" / "parts" / seal.directory / "sample_tokens" / "c.0.0"
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    assert repair(verify(path)) == [1]
    assert CacheReader(path).num_samples == 3
    write(cache, 1)
    assert CacheReader(path).num_samples == 6
    assert report.ok


def test_blocks_hold_whole_samples_and_keep_an_image_together():
    rng = np.random.default_rng(0)
    records = make_records(rng, 20, questions=4)
    blocks = list(group_blocks(records, 40))
    assert [r for block in blocks for r in block] == records
    for before, after in itertools.pairwise(blocks):
        keys = {v.key for r in before for v in r.visual}
        assert not keys & {v.key for r in after for v in r.visual}


def test_a_part_directory_is_a_zarr_group(tmp_path):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest())
    seal = write(cache, 0)
    document = json.loads((tmp_path / "l1" / "parts" / seal.directory / "zarr.json").read_bytes())
    assert document["node_type"] == "group"
    assert layout.is_directory_of(seal.directory, 0)
    assert set(seal.files) == {
        p.relative_to(tmp_path / "l1" / "parts" / seal.directory).as_posix()
        for p in Path(tmp_path / "l1" / "parts" / seal.directory).rglob("*")
        if p.is_file()
    }
    assert read_manifest(tmp_path / "l1") == make_manifest()


def test_a_lost_reply_is_no_defeat(tmp_path, monkeypatch):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest())
    create = LocalStore.create

    def lose_the_reply(self, key, data):
        return create(self, key, data) and not key.startswith("seals/0")

    monkeypatch.setattr(LocalStore, "create", lose_the_reply)
    seal = write(cache, 0)
    assert (tmp_path / "l1" / "parts" / seal.directory).is_dir()
    assert verify(str(tmp_path / "l1")).ok
    assert_same_record(
        CacheReader(str(tmp_path / "l1")).read_record("sample-0"), records_of(0)[0], step=1 / 16
    )


def wide_records(*, count, width):
    """Samples that share one image, each with hidden states of `width`."""
    rng = np.random.default_rng(0)
    images = [make_visual(rng, i, positions=64, topk=2, rank=1, hidden=width) for i in range(count)]
    return [make_record(rng, f"s{i}", (image,), topk=2) for i, image in enumerate(images)]


def test_blocks_split_before_a_codec_refuses_them(tmp_path):
    records = wide_records(count=10, width=40_000)  # 25.6 million values, a codec takes 16.8
    blocks = list(group_blocks(records, 630))  # rows alone would put nine into the first block
    assert [r for block in blocks for r in block] == records
    assert max(len(block) for block in blocks) * 64 * 40_000 <= MAX_CHUNK_VALUES
    manifest = make_manifest(num_samples=10, part_samples=10, topk=2, store="both", hidden_size=40_000)
    writer = CacheWriter.open(str(tmp_path / "l1"), manifest, block_rows=630)
    writer.write_part(0, records, first_sample=0, num_samples=10)
    with CacheReader(str(tmp_path / "l1")) as cache:
        assert cache.num_blocks == len(blocks) > 1
        found = cache.read_record("s9").visual[0].hidden
        assert np.abs(found - records[9].visual[0].hidden).max() < 0.05


@pytest.mark.parametrize("array", ["rows", "factor", "tokens"])
def test_every_array_has_its_budget(array):
    rng, limit = np.random.default_rng(0), MAX_CHUNK_VALUES
    base = make_record(rng, "s", (make_visual(rng, 0, positions=16, topk=2, rank=1),), topk=2)
    wide = np.broadcast_to(np.float32(0), (16, limit // 64))
    if array == "rows":
        ids = np.broadcast_to(np.int32(0), wide.shape)
        topk = dataclasses.replace(base.visual[0].topk, token_ids=ids, logprobs=wide)
        big = dataclasses.replace(base.visual[0], topk=topk)
    else:
        big = dataclasses.replace(base.visual[0], factor=wide)
    records = [
        dataclasses.replace(base, sample_id=f"{i}", visual=(dataclasses.replace(big, key=f"{i:032x}"),))
        for i in range(10)
    ]
    if array == "tokens":
        tokens = np.broadcast_to(np.int32(0), (limit // 4,))
        records = [dataclasses.replace(base, sample_id=f"{i}", token_ids=tokens) for i in range(10)]
    assert [len(block) for block in group_blocks(records, 10**9)] == [4, 4, 2]


def test_a_sample_too_large_for_any_block_is_named():
    record = make_record(np.random.default_rng(0), "giant", (), topk=2)
    tokens = np.broadcast_to(np.int32(0), (MAX_CHUNK_VALUES + 1,))
    with pytest.raises(DataError, match="'giant' has 16777217 values"):
        list(group_blocks([dataclasses.replace(record, token_ids=tokens)], 100))


def test_a_codec_that_refuses_is_an_error_of_ours():
    with pytest.raises(DataError, match="pcodec refuses"):
        encode_chunk(np.zeros(5, np.int32), MAX_CHUNK_VALUES + 6, 5, Coding("pcodec", 1))


def test_what_dead_writers_left_is_gone_after_the_resume(tmp_path):
    path, manifest = tmp_path / "l1", make_manifest()
    process = multiprocessing.get_context("fork").Process(
        target=crash_before, args=(str(path), manifest, "add")
    )
    process.start()
    process.join()
    left = [each.name for each in (path / ".writing").iterdir()]
    assert len(left) == 1
    another_host = path / ".writing" / "00001-aa~00000000-1-1"
    another_host.mkdir()
    a_pull = path / ".writing" / "00001-bb"
    a_pull.mkdir()
    mine = make_working(LocalStore(path), "00001-cc")
    cache = CacheWriter.open(str(path), manifest)
    assert {each.name for each in (path / ".writing").iterdir()} == {
        another_host.name,
        a_pull.name,
        mine.name,
    }
    os.utime(another_host, (0, 0))
    a_pull.rmdir()
    mine.rmdir()
    write(cache, 0)
    write(cache, 1)
    cache.finalize()
    assert not (path / ".writing").exists()


def test_a_complete_level_needs_no_writing(tmp_path):
    path, manifest = tmp_path / "disk" / "l1", make_manifest()
    path.parent.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path.parent)], check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        cache = CacheWriter.open(str(path), manifest)
        write(cache, 0)
        write(cache, 1)
        cache.finalize()
        subprocess.run(["mount", "-o", "remount,ro", str(path.parent)], check=True)
        again = CacheWriter.open(str(path), manifest)
        assert again.sealed == {0, 1}
        again.finalize()
        with CacheReader(str(path)) as reader:
            assert reader.num_samples == 6
    finally:
        subprocess.run(["umount", str(path.parent)], check=True)
