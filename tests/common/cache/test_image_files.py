"""A cache that holds its image files: each once, proven, left out on demand, enough for a student."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.cache.own_samples import OwnSamples
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.subset import held_groups, parse_arrays
from common.cache.transfer import transfer
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import DataError, MismatchError, PartCorrupt
from tests.common.cache.records import make_manifest, make_records

FILES = [bytes([i]) * (100 + i) for i in range(20)]


def with_files(records):
    """Records whose image of number i has the file `FILES[i]`."""
    given = []
    for record in records:
        visual = []
        for image in record.visual:
            data = FILES[int(image.key, 16)]
            sha256 = hashlib.sha256(data).hexdigest()
            visual.append(dataclasses.replace(image, image_sha256=sha256, encoded=data))
        given.append(dataclasses.replace(record, visual=tuple(visual)))
    return given


def records_of(part):
    return with_files(make_records(np.random.default_rng(part), 3, first=3 * part))


@pytest.fixture
def source(tmp_path):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest(with_images=True), block_rows=30)
    for part in range(2):
        cache.write_part(part, records_of(part), first_sample=3 * part, num_samples=3)
    cache.finalize()
    return str(tmp_path / "l1")


def test_every_sample_comes_with_its_images(source):
    with CacheReader(source) as cache:
        samples = OwnSamples(cache)
        wanted = {r.sample_id: [v.encoded for v in r.visual] for part in range(2) for r in records_of(part)}
        assert {s.sample_id: [i.data for i in s.images] for s in samples} == wanted
        assert len(set(samples.image_keys().tolist())) == len({tuple(files) for files in wanted.values()})
        held = sum(cache.read_images(block).num_bytes for block in range(cache.num_blocks))
        assert held <= sum(len(FILES[i]) for i in (0, 2, 3, 4)) + len(FILES[2])
    assert not verify(source).problems


def test_stripped_of_images_it_is_the_cache_without(source, tmp_path):
    target = str(tmp_path / "stripped")
    transfer([source], target, keep=parse_arrays("topk,visual,relation,hidden"))
    with CacheReader(target) as cache, CacheReader(source) as whole:
        assert "images" not in held_groups(cache.manifest)
        for sample_id in whole.sample_ids:
            old, new = whole.read_record(sample_id), cache.read_record(sample_id)
            assert [v.image_sha256 for v in old.visual] == [v.image_sha256 for v in new.visual]
            assert np.array_equal(old.visual[0].factor, new.visual[0].factor)
        with pytest.raises(MismatchError, match="--data"):
            OwnSamples(cache)
    assert not verify(target).problems
    assert not [p for p in Path(target).rglob("*") if p.name.startswith("image_file")]


def test_a_writer_refuses_images_without_their_files(tmp_path):
    cache = CacheWriter.open(str(tmp_path / "l1"), make_manifest(with_images=True))
    plain = make_records(np.random.default_rng(0), 3)
    swapped = [
        dataclasses.replace(r, visual=tuple(dataclasses.replace(v, encoded=b"other") for v in r.visual))
        for r in plain
    ]
    for records in (plain, swapped):
        with pytest.raises(DataError, match="image"):
            cache.write_part(0, records, first_sample=0, num_samples=3)


def test_a_damaged_image_file_is_never_handed_out(source):
    seal = read_seal(source, 0)
    victim = Path(source) / "parts" / seal.directory / "image_files" / "c.0.0"
    data = victim.read_bytes()
    for place in range(0, len(data), 7):
        victim.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with CacheReader(source) as cache:
            try:
                found = [cache.read_images(block).files for block in range(cache.num_blocks)]
            except PartCorrupt:
                continue
            assert all(hashlib.sha256(d).hexdigest() == name for files in found for name, d in files.items())
    assert verify(source).bad_parts == [0]
