"""Documents made to break a reader end in an error of ours, and never in more memory than stated."""

import json
import os
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from common.cache import documents as documents_of_caches
from common.cache import layout, part
from common.cache.hashing import hash_files
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.shard import crc32c
from common.cache.store import MAX_WHOLE_BYTES
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import CacheError, PartCorrupt
from schemas.manifest import Manifest
from tests.common.cache.records import make_manifest, make_records
from tests.common.cache.test_verify import rewrite


@pytest.fixture
def cache(tmp_path):
    writer = CacheWriter.open(str(tmp_path / "l1"), make_manifest())
    for number in range(2):
        records = make_records(np.random.default_rng(number), 3, first=3 * number)
        writer.write_part(number, records, first_sample=3 * number, num_samples=3)
    writer.finalize()
    return tmp_path / "l1"


def documents(cache):
    directory = f"parts/{read_seal(cache, 0).directory}"
    return {
        "manifest": "zarr.json",
        "seal": "seals/00000/zarr.json",
        "index": "index/zarr.json",
        "part": f"{directory}/zarr.json",
        "array": f"{directory}/sample_tokens/zarr.json",
    }


def read(cache):
    with CacheReader(str(cache)) as reader:
        return [reader.read_record(i) for i in range(reader.num_samples)], reader.seals


TEXTS = {
    "nested": "[" * 200_000,
    "nested object": '{"attributes":' * 50_000,
    "nested in attributes": '{"attributes": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
    "a list": "[]",
    "a string": '"attributes"',
    "null": '{"attributes": null}',
    "infinity": '{"attributes": {"num_blocks": 1e999}}',
    "not text": "\udcff",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["manifest", "seal", "index", "part", "array"])
def test_a_document_of_any_shape_is_an_error_of_ours(cache, name, text):
    path = cache / documents(cache)[name]
    path.write_bytes(TEXTS[text].encode(errors="surrogateescape"))
    assert not verify(str(cache)).ok
    with pytest.raises(CacheError):
        read(cache)


CHANGES = {
    "infinite": lambda a: a.update(num_blocks=float("inf")),
    "not a number": lambda a: a.update(num_blocks=float("nan")),
    "no ids": lambda a: a.pop("ids"),
    "no arrays": lambda a: a.update(arrays={}),
    "lengths of nothing": lambda a: a["arrays"]["sample_tokens"].update(lengths=[]),
    "lengths of text": lambda a: a["arrays"]["sample_tokens"].update(lengths="x"),
    "endless lengths": lambda a: a["arrays"]["sample_tokens"].update(lengths=[10**30]),
    "ranks of a line": lambda a: a["arrays"]["sample_tokens"].update(ranks=2),
    "fewer ranks": lambda a: a["arrays"]["sample_spans"].update(ranks=1),
    "fewer columns": lambda a: a["arrays"]["sample_columns"].update(ranks=2),
    "other scope": lambda a: a["ids"]["response"].update(scope=["owner"]),
    "other table": lambda a: a["ids"].pop("response"),
    "no codes": lambda a: a["arrays"].pop("response_codes"),
    "no levels": lambda a: [a["arrays"].pop(n, None) for n in ("response_level_pairs", "response_levels")],
    "no scalars": lambda a: a["arrays"].pop("response_scalar_steps"),
    "fewer scalars": lambda a: a["arrays"]["response_scalar_steps"].update(ranks=2),
    "no keys": lambda a: a["arrays"].pop("image_keys"),
    "no errors": lambda a: a["arrays"].pop("image_errors"),
    "fewer factor columns": lambda a: a["arrays"]["image_factor"].update(ranks=2),
    "no positions": lambda a: a["arrays"].pop("visual_positions"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_attributes_that_contradict_are_an_error_of_ours(cache, name):
    path = cache / documents(cache)["part"]
    rewrite(path, CHANGES[name])
    reseal(cache)
    assert verify(str(cache)).bad_parts == [0]
    with pytest.raises(CacheError):
        read(cache)


def reseal(cache):
    """Make the seal fit what a hostile author wrote."""
    files = hash_files(cache / "parts" / read_seal(cache, 0).directory)
    rewrite(
        cache / "seals" / "00000" / "zarr.json",
        lambda seal: seal.update(files={name: file.model_dump() for name, file in files.items()}),
    )


@pytest.mark.parametrize("name", ["manifest", "seal", "index", "part", "array"])
def test_no_whole_file_is_read_beyond_its_bound(cache, name):
    path = cache / documents(cache)[name]
    with path.open("ab") as file:
        file.truncate(MAX_WHOLE_BYTES + 1)
    with pytest.raises(CacheError, match=f"{MAX_WHOLE_BYTES + 1} bytes"):
        read(cache)


def test_the_arrays_of_a_block_share_one_budget(cache, monkeypatch):
    shutil.rmtree(cache / "index")
    monkeypatch.setattr(part, "MAX_BLOCK_BYTES", 3000)
    with pytest.raises(PartCorrupt, match="more than 3000; refused"):
        CacheReader(str(cache))


def test_a_chunk_is_not_larger_than_its_values(cache):
    directory = cache / "parts" / read_seal(cache, 0).directory / "sample_tokens"
    path = directory / "c.0.0"
    data = path.read_bytes()
    index = bytearray(data[-20:-4])
    index[8:16] = (1 << 20).to_bytes(8, "little")
    path.write_bytes(bytes(1 << 20) + bytes(index) + crc32c(bytes(index)).to_bytes(4, "little"))
    shutil.rmtree(cache / "index")
    with pytest.raises(PartCorrupt, match="more bytes than its values"):
        read(cache)


def test_a_lost_sample_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(CacheWriter, "_check", lambda *_, **__: None)
    writer = CacheWriter.open(str(tmp_path / "l1"), make_manifest())
    records = make_records(np.random.default_rng(0), 6)
    writer.write_part(0, records[:2], first_sample=0, num_samples=3)
    writer.write_part(1, records[3:], first_sample=3, num_samples=3)
    writer.finalize()
    report = verify(str(tmp_path / "l1"), deep=False)
    assert report.bad_parts == [0]
    assert "some are lost" in report.problems[0].message


@pytest.mark.parametrize("name", ["num_images", "num_response_rows", "num_visual_rows"])
def test_counts_of_a_seal_are_proven(cache, name):
    rewrite(cache / "seals" / "00000" / "zarr.json", lambda seal: seal.update({name: seal[name] + 1}))
    assert verify(str(cache)).bad_parts == [0]


def test_a_sample_twice_in_a_part_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(CacheWriter, "_check", lambda *_, **__: None)
    writer = CacheWriter.open(str(tmp_path / "l1"), make_manifest(num_samples=3))
    record = make_records(np.random.default_rng(0), 1)[0]
    writer.write_part(0, [record] * 3, first_sample=0, num_samples=3)
    assert verify(str(tmp_path / "l1")).bad_parts == [0]


def test_guards_say_value_error_for_anything():
    for text in TEXTS.values():
        with pytest.raises(ValueError, match=r".+"):
            layout.read_guarded_json(text.encode(errors="surrogateescape"))
    assert layout.read_guarded_json(layout.guarded_json({"a": 1})) == {"a": 1}
    assert json.loads(layout.group_json({}))["node_type"] == "group"


def test_a_file_that_may_not_be_read_is_an_error_of_ours(cache, monkeypatch):
    real_open = os.open

    def refuse(path, flags, *rest):
        if str(path).endswith("sample_tokens/c.0.0"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CacheError, match="permissions"):
        read(cache)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[" * 33 + b"]" * 33, "nests deeper"),
        (b"[" + b"[]," * (1 << 20) + b"[]]", "nests deeper"),
    ],
)
def test_documents_are_bounded_before_they_are_parsed(text, said):
    with pytest.raises(ValueError, match=said):
        documents_of_caches.parse_document(text)


def test_brackets_inside_strings_are_text():
    value = {"a": "[" * 200 + '"\\' + "{" * 200, "b": [[]] * 40}
    assert documents_of_caches.parse_document(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": {"fingerprint": "f", "num_samples": 10**12}},
        {"vocab_rows": 10**12},
        {"hidden_size": 10**9},
        {"encoding": {"logit_step": 1e300}},
        {"encoding": {"logit_step": 1e-300}},
        {"capture": {"topk": 2**40, "visual_topk": 1}},
        {"capture": {"topk": 1, "visual_topk": 1, "temperatures": []}},
        {"capture": {"topk": 1, "visual_topk": 1, "temperatures": [float("nan")]}},
        {"relation": {"tolerance": float("inf")}},
    ],
)
def test_manifests_ask_for_no_more_than_a_level_can_be(changes):
    with pytest.raises(ValidationError):
        Manifest.model_validate(make_manifest().model_dump() | changes)
