"""Stock Zarr opens a cache, sees the same numbers, and writes shards that are read here."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from common.cache.part import PartReader
from common.cache.seals import read_seal
from common.cache.shard import ShardReader
from common.cache.store import LocalStore
from common.cache.writer import CacheWriter
from tests.common.cache.records import make_manifest, make_records

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")


def write(path, profile):
    manifest = make_manifest(profile=profile, store="both")
    cache = CacheWriter.open(str(path), manifest, block_rows=30)
    for part in range(2):
        records = make_records(np.random.default_rng(part), 3, first=3 * part)
        cache.write_part(part, records, first_sample=3 * part, num_samples=3)
    cache.finalize()
    return manifest


@pytest.mark.parametrize("profile", ["pcodec", "portable"])
def test_stock_zarr_reads_the_same_numbers(tmp_path, profile):
    manifest = write(tmp_path / "l1", profile)
    root = zarr.open_group(str(tmp_path / "l1"), mode="r")
    assert root.attrs["vocab_rows"] == manifest.vocab_rows
    assert root["seals/00000"].attrs["num_records"] == 3
    directory = read_seal(tmp_path / "l1", 0).directory
    part = PartReader(LocalStore(tmp_path / "l1"), f"parts/{directory}")
    group = root[f"parts/{directory}"]
    assert {name for name, _ in group.arrays()} == set(part.arrays)
    for name, reader in part.arrays.items():
        whole = group[name][:]
        assert whole.dtype == reader.meta.dtype
        for block in range(part.num_blocks):
            length = part.info.lengths[name][block] * part.info.ranks.get(name, 1)
            assert np.array_equal(reader.read_block(block, length), whole[block, :length]), name
            assert not whole[block, length:].any()


def test_a_finished_cache_is_a_clean_hierarchy(tmp_path):
    write(tmp_path / "l1", "portable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(str(tmp_path / "l1"), mode="r")
        names = {name.split("/")[0] for name, _ in root.members(max_depth=None)}
    assert names == {"parts", "seals", "index"}


@pytest.mark.parametrize("codec", ["pcodec", "blosc"])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_shards_of_stock_zarr_are_read_here(tmp_path, codec, dtype):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(5, 300)) * 100).astype(dtype)
    options = {
        "pcodec": {"serializer": PCodec(level=4, mode_spec="classic"), "compressors": [Crc32cCodec()]},
        "blosc": {
            "serializer": BytesCodec(),
            "compressors": [
                BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=values.itemsize),
                Crc32cCodec(),
            ],
        },
    }[codec]
    group = zarr.open_group(str(tmp_path / "z"), mode="w", zarr_format=3)
    array = group.create_array(
        "a",
        shape=values.shape,
        shards=values.shape,
        chunks=(1, 300),
        dtype=dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        **options,
    )
    array[:] = values
    reader = ShardReader(LocalStore(tmp_path / "z"), "a")
    for block in range(5):
        assert np.array_equal(reader.read_block(block, 300), values[block])
        assert np.array_equal(reader.read_block(block, 256), values[block, :256])


def test_stock_zarr_needs_nothing_of_ours(tmp_path):
    write(tmp_path / "l1", "portable")
    code = (
        "import sys, zarr; root = zarr.open_group(sys.argv[1], mode='r');"
        "parts = [g for _, g in root['parts'].groups()];"
        "print(sum(int(a[:].sum()) for g in parts for n, a in g.arrays() if n == 'sample_tokens'));"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('common', 'schemas')]"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "l1")]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    wanted = sum(
        int(r.token_ids.sum())
        for part in range(2)
        for r in make_records(np.random.default_rng(part), 3, first=3 * part)
    )
    assert int(answer.stdout) == wanted


def test_the_portable_profile_opens_with_tensorstore(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    write(tmp_path / "l1", "portable")
    directory = read_seal(tmp_path / "l1", 0).directory
    part = PartReader(LocalStore(tmp_path / "l1"), f"parts/{directory}")
    for name, reader in part.arrays.items():
        kvstore = {"driver": "file", "path": str(tmp_path / "l1" / "parts" / directory / name)}
        whole = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        for block in range(part.num_blocks):
            length = part.info.lengths[name][block] * part.info.ranks.get(name, 1)
            assert np.array_equal(reader.read_block(block, length), whole[block, :length]), name


def test_metadata_is_what_stock_zarr_would_write(tmp_path):
    write(tmp_path / "l1", "pcodec")
    directory = read_seal(tmp_path / "l1", 0).directory
    path = tmp_path / "l1" / "parts" / directory / "response_codes" / "zarr.json"
    ours = json.loads(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = zarr.open_array(str(path.parent), mode="r").metadata.to_dict()
    assert ours["shape"] == list(theirs["shape"])
    for name in ("zarr_format", "node_type", "fill_value", "attributes"):
        assert ours[name] == theirs[name], name
