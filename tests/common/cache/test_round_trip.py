"""What goes in comes out, to the stated error, in every ragged shape."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cache.reader import CacheReader
from common.cache.writer import CacheWriter
from common.errors import DataError
from tests.common.cache.records import (
    VOCAB,
    assert_same_record,
    make_manifest,
    make_record,
    make_records,
    make_visual,
    topk_of,
)


def write_cache(path, records, manifest, block_rows=60):
    with CacheWriter.open(str(path), manifest, block_rows=block_rows) as cache:
        for part in range(manifest.num_parts):
            first = part * manifest.part_samples
            chosen = records[first : first + manifest.part_samples]
            cache.write_part(part, chosen, first_sample=first, num_samples=len(chosen))
    return str(path)


def round_trip(path, records, manifest, *, step=None, block_rows=60):
    with CacheReader(write_cache(path, records, manifest, block_rows)) as cache:
        assert cache.complete
        assert list(cache.sample_ids) == [r.sample_id for r in records]
        assert list(cache.kinds) == [r.kind for r in records]
        for record in records:
            found = cache.read_record(record.sample_id)
            assert_same_record(found, record, step=manifest.encoding.logit_step if step is None else step)


@pytest.mark.parametrize("profile", ["pcodec", "portable"])
@pytest.mark.parametrize("logits", ["steps", "bfloat16", "float32"])
def test_every_encoding(tmp_path, profile, logits):
    records = make_records(np.random.default_rng(0), 6)
    manifest = make_manifest(profile=profile, logits=logits)
    if logits == "bfloat16":
        manifest_records = [as_bfloat16(r) for r in records]
        round_trip(tmp_path / "l1", manifest_records, manifest, step=1e-5)
    else:
        round_trip(tmp_path / "l1", records, manifest, step=0.0 if logits == "float32" else None)


def as_bfloat16(record):
    """The record as a head that emits bfloat16 would have given it."""

    def narrow(rows):
        logits = (rows.logprobs + rows.logsumexp[:, :1]).astype(np.float32)
        short = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
        return dataclasses.replace(rows, logprobs=-np.sort(-(short - rows.logsumexp[:, :1]), axis=1))

    visual = tuple(dataclasses.replace(v, topk=narrow(v.topk)) for v in record.visual)
    return dataclasses.replace(record, response=narrow(record.response), visual=visual)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ragged_shape(tmp_path_factory, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    topk = draw(st.sampled_from([1, 2, 5, 8, VOCAB]))
    count = draw(st.integers(1, 5))
    records = []
    for i in range(count):
        images = [
            make_visual(
                rng,
                draw(st.integers(0, 3)) + 10 * i,
                positions=draw(st.sampled_from([1, 4, 9])),
                topk=draw(st.sampled_from([topk, None])),
                rank=draw(st.sampled_from([None, 0, 1, 3])),
            )
            for _ in range(draw(st.integers(0, 2)))
        ]
        images = list({v.key: v for v in images}.values())
        response = draw(st.sampled_from([0, 1, 7]))
        records.append(
            make_record(
                rng,
                f"s{i}é",
                images,
                response=response,
                topk=topk,
                kind=draw(st.sampled_from([None, "", "q"])),
            )
        )
    manifest = make_manifest(num_samples=count, part_samples=draw(st.integers(1, count)), topk=topk)
    round_trip(
        tmp_path_factory.mktemp("l"), records, manifest, block_rows=draw(st.sampled_from([1, 20, 1000]))
    )


def test_adaptive_k_and_masked_logits(tmp_path):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, VOCAB))
    logits[:, 3:] = np.where(rng.random((5, VOCAB - 3)) < 0.99, -np.inf, logits[:, 3:])
    record = make_record(rng, "masked")
    record = dataclasses.replace(record, response=topk_of(logits, topk=8, start=1))
    assert np.isneginf(record.response.logprobs).any()
    round_trip(tmp_path / "l1", [record], make_manifest(num_samples=1, part_samples=1))


def test_equal_logits_and_the_last_id(tmp_path):
    record = make_record(np.random.default_rng(0), "flat", topk=4)
    logits = np.zeros((5, VOCAB))
    logits[:, VOCAB - 1] = 1
    record = dataclasses.replace(record, response=topk_of(logits, topk=4, start=1))
    assert (record.response.token_ids[:, 0] == VOCAB - 1).all()
    round_trip(tmp_path / "l1", [record], make_manifest(num_samples=1, part_samples=1, topk=4))


def test_several_temperatures(tmp_path):
    temperatures = (1.0, 2.0, 4.0)
    rng = np.random.default_rng(0)
    records = [make_record(rng, f"s{i}", temperatures=temperatures) for i in range(3)]
    manifest = make_manifest(num_samples=3, capture={"temperatures": temperatures})
    round_trip(tmp_path / "l1", records, manifest)


def test_levels_too_far_apart_to_pair(tmp_path):
    record = make_record(np.random.default_rng(0), "sharp")
    logits = np.random.default_rng(0).normal(scale=300, size=(5, VOCAB))
    record = dataclasses.replace(record, response=topk_of(logits, topk=8, start=1))
    round_trip(tmp_path / "l1", [record], make_manifest(num_samples=1, part_samples=1))
    round_trip(tmp_path / "l2", [record], make_manifest(num_samples=1, part_samples=1, logit_step=1 / 1000))


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_hidden_states(tmp_path, encoding):
    rng = np.random.default_rng(0)
    records = [make_record(rng, f"s{i}", [make_visual(rng, i, hidden=12)]) for i in range(2)]
    manifest = make_manifest(num_samples=2, store="both", hidden_encoding=encoding)
    with CacheReader(write_cache(tmp_path / "l1", records, manifest)) as cache:
        for record in records:
            found, wanted = cache.read_record(record.sample_id).visual[0].hidden, record.visual[0].hidden
            bound = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 254}[encoding]
            assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max() * (1 + 1e-5)


def test_factor_keeps_the_relation(tmp_path):
    rng = np.random.default_rng(0)
    records = [make_record(rng, f"s{i}", [make_visual(rng, i, positions=25, rank=6)]) for i in range(3)]
    with CacheReader(write_cache(tmp_path / "l1", records, make_manifest(num_samples=3))) as cache:
        for record in records:
            a, b = (r.visual[0].factor for r in (cache.read_record(record.sample_id), record))
            assert np.linalg.norm(a @ a.T - b @ b.T) <= 1e-3 * np.linalg.norm(b @ b.T)
        assert cache.seals[0].errors["factor_relation"] <= 1e-3


def test_samples_of_one_image_share_its_knowledge(tmp_path):
    rng = np.random.default_rng(0)
    images = [make_visual(rng, i) for i in range(3)]
    records = [make_record(rng, f"s{i}", [images[i // 10]]) for i in range(30)]
    manifest = make_manifest(num_samples=30, part_samples=30)
    with CacheReader(write_cache(tmp_path / "l1", records, manifest, block_rows=16384)) as cache:
        assert cache.seals[0].num_images == 3
        block = cache.read_block(0)
        assert block.record(0).visual[0] is block.record(9).visual[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path, value):
    record = make_record(np.random.default_rng(0), "bad")
    record.response.logprobs[2, 3] = value
    with pytest.raises(DataError, match="NaN"):
        write_cache(tmp_path / "l1", [record], make_manifest(num_samples=1))
    record = make_record(np.random.default_rng(0), "bad", [make_visual(np.random.default_rng(0), 0)])
    record.visual[0].factor[0, 0] = value
    with pytest.raises(DataError, match="NaN"):
        write_cache(tmp_path / "l2", [record], make_manifest(num_samples=1))


def test_rising_rows_and_negative_ids_are_refused(tmp_path):
    record = make_record(np.random.default_rng(0), "bad")
    record.response.logprobs[0] = record.response.logprobs[0, ::-1]
    with pytest.raises(DataError, match="rise"):
        write_cache(tmp_path / "l1", [record], make_manifest(num_samples=1))
    record = make_record(np.random.default_rng(0), "bad")
    record.response.token_ids[0, 1] = -1
    with pytest.raises(DataError, match="below 0"):
        write_cache(tmp_path / "l2", [record], make_manifest(num_samples=1))
