"""What stands where it cannot is neither sealed nor read."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cache import pack
from common.cache.bounds import find_fault
from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import DataError, PartCorrupt
from common.spans import response_rows
from schemas.sample import Span, Tile
from tests.common.cache.records import VOCAB, make_manifest, make_records


def spans(*edges):
    return tuple(Span(kind=kind, start=a, stop=b) for kind, a, b in edges)


def with_image(record, **changes):
    return dataclasses.replace(record, visual=(dataclasses.replace(record.visual[0], **changes),))


def with_rows(rows, shift):
    return dataclasses.replace(rows, positions=rows.positions + np.int32(shift))


def with_tile(record, **changes):
    tile = record.visual[0].tiles[0].model_copy(update=changes)
    return with_image(record, tiles=(tile,))


def with_token(record, value):
    tokens = record.token_ids.copy()
    tokens[3] = value
    return dataclasses.replace(record, token_ids=tokens)


# prompt 0-2, image 2-11, response 11-16
FAULTS = {
    "gap": lambda r: dataclasses.replace(
        r, spans=spans(("prompt", 0, 1), ("image", 2, 11), ("response", 11, 16))
    ),
    "order": lambda r: dataclasses.replace(r, spans=(r.spans[1], r.spans[0], r.spans[2])),
    "backwards": lambda r: dataclasses.replace(r, spans=(*r.spans, *spans(("prompt", 16, 12)))),
    "past the end": lambda r: dataclasses.replace(r, spans=(*r.spans[:2], *spans(("response", 11, 90000)))),
    "short": lambda r: dataclasses.replace(r, spans=(*r.spans[:2], *spans(("response", 11, 15)))),
    "response rows": lambda r: dataclasses.replace(r, response=with_rows(r.response, 7)),
    "one row late": lambda r: dataclasses.replace(r, response=with_rows(r.response, 1)),
    "image elsewhere": lambda r: with_image(r, start=3),
    "image longer": lambda r: with_image(r, num_positions=8, factor=r.visual[0].factor[:8]),
    "no image": lambda r: dataclasses.replace(r, visual=()),
    "two images": lambda r: dataclasses.replace(r, visual=r.visual * 2),
    "visual rows": lambda r: with_image(r, topk=with_rows(r.visual[0].topk, 7)),
    "visual rows before": lambda r: with_image(r, topk=with_rows(r.visual[0].topk, -1)),
    "token": lambda r: with_token(r, VOCAB),
    "negative token": lambda r: with_token(r, -1),
    "tile rows": lambda r: with_tile(r, rows=4),
    "tile offset": lambda r: with_tile(r, offset=1),
    "tile before": lambda r: with_tile(r, offset=-1),
    "tile stride": lambda r: with_tile(r, stride=2**30),
    "tile of none": lambda r: with_tile(r, columns=0),
}


def damaged(name):
    records = make_records(np.random.default_rng(0), 3, questions=1)
    return [records[0], FAULTS[name](records[1]), records[2]]


def write(path, records):
    cache = CacheWriter.open(str(path), make_manifest(num_samples=3))
    cache.write_part(0, records, first_sample=0, num_samples=3)
    return str(path)


@pytest.mark.parametrize("name", FAULTS)
def test_a_writer_refuses_and_names_what_stands_wrong(tmp_path, name):
    with pytest.raises(DataError, match=r"sample-1|0{31}1"):
        write(tmp_path / "l1", damaged(name))


@pytest.mark.parametrize("name", FAULTS)
def test_a_reader_refuses_what_another_writer_sealed(tmp_path, name, monkeypatch):
    monkeypatch.setattr(pack, "find_fault", lambda *_: None)
    path = write(tmp_path / "l1", damaged(name))
    with CacheReader(path) as cache, pytest.raises(PartCorrupt, match="dump the part again"):
        cache.read_block(0)
    assert verify(path).bad_parts == [0]


def test_unknown_kinds_of_spans_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_KIND_CODE", {"image": 7, "prompt": 1, "response": -1})
    monkeypatch.setattr(pack, "find_fault", lambda *_: None)
    path = write(tmp_path / "l1", make_records(np.random.default_rng(0), 3))
    assert verify(path).bad_parts == [0]
    with CacheReader(path) as cache, pytest.raises(PartCorrupt, match="unknown kind"):
        cache.read_record(0)


def test_kept_ids_beyond_the_head_are_refused(tmp_path):
    records = make_records(np.random.default_rng(0), 3)
    records[1].response.token_ids[0, 2] = VOCAB
    with pytest.raises(DataError, match="kept id"):
        write(tmp_path / "l1", records)


def slow_fault(block):
    """The definition of `find_fault` for spans and response rows: one sample at a time, no images."""
    row = span = 0
    for sample, (length, num_spans, _, num_rows) in enumerate(block["sample_columns"][:4].T.tolist()):
        at, wanted = 0, []
        for kind, start, stop in block["sample_spans"][:, span : span + num_spans].T.tolist():
            if kind not in (1, 2) or start != at or stop < start:
                return sample
            at = stop
            if kind == 2:
                wanted += range(start - 1, stop - 1)
        if at != length:
            return sample
        held = block["response_positions"][row : row + num_rows].tolist()
        if num_rows and (held != wanted or min(held) < 0):
            return sample
        row, span = row + num_rows, span + num_spans
    return None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_at_once_is_one_by_one(data):
    lengths = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5))
    columns, cells, positions = [], [], []
    for parts in lengths:
        edges = np.concatenate([[0], np.cumsum(parts)]).astype(int)
        kinds = [data.draw(st.sampled_from([1, 2])) for _ in parts]
        covered = [(k, a, b) for k, a, b in zip(kinds, edges[:-1], edges[1:], strict=True)]
        rows = [p - 1 for k, a, b in covered if k == 2 for p in range(a, b)]
        rows = rows if data.draw(st.booleans()) else []
        columns.append([edges[-1], len(parts), 0, len(rows), 1, -1])
        cells += covered
        positions += rows
    block = {
        "sample_columns": np.array(columns, np.int32).T,
        "sample_spans": np.array(cells, np.int32).reshape(-1, 3).T.copy(),
        "sample_tokens": np.zeros(sum(c[0] for c in columns), np.int32),
        "response_positions": np.array(positions, np.int32),
    }
    for name in data.draw(st.sets(st.sampled_from(["sample_spans", "response_positions"]))):
        if block[name].size:
            at = data.draw(st.integers(0, block[name].size - 1))
            block[name].flat[at] += data.draw(st.sampled_from([-1, 1, 3]))
    assert (find_fault(block, VOCAB) is None) == (slow_fault(block) is None)


def test_random_records_are_without_fault():
    manifest = make_manifest()
    records = make_records(np.random.default_rng(3), 9)
    assert [p.tolist() for p in (r.response.positions for r in records)] == [
        response_rows(r.spans).tolist() for r in records
    ]
    pack.pack_part([records], manifest)
    assert isinstance(records[0].visual[0].tiles[0], Tile)
