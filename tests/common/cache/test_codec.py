"""Laws of the encodings, and the slow twins of the fast ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cache import codec, states
from common.errors import DataError


def falling_rows(rng, num_rows, topk, spread=3.0):
    logprobs = -np.sort(rng.exponential(spread, (num_rows, topk)), axis=1).astype(np.float32)
    ids = np.array([rng.permutation(5000)[:topk] for _ in range(num_rows)]).reshape(num_rows, topk)
    return ids.astype(np.int32), logprobs


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
def test_ids_come_back(num_rows, topk, seed, by_owner):
    rng = np.random.default_rng(seed)
    ids, _ = falling_rows(rng, num_rows, topk)
    used = np.sort(rng.random(ids.shape) < 0.8, axis=1)[:, ::-1]
    cut = int(rng.integers(0, num_rows + 1))
    owners = (cut, num_rows - cut) if by_owner else (num_rows,)
    code = codec.encode_ids_by_owner(ids, used, owners)
    back = codec.decode_ids(np.ascontiguousarray(code.codes.T), code.dictionary, code.sizes, owners).T
    assert np.array_equal(back[used], ids[used])


def test_frequent_ids_get_small_codes():
    ids = np.array([[7, 1], [7, 2], [7, 3], [7, 4]], np.int32)
    assert codec.build_dictionary(ids).tolist() == [7, 1, 2, 3, 4]


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 17),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1 / 4, 1 / 16, 1 / 22]),
)
def test_fast_decoding_equals_the_slow_twin(num_rows, topk, seed, step):
    rng = np.random.default_rng(seed)
    ids, logprobs = falling_rows(rng, num_rows, topk)
    used = np.ones(ids.shape, bool)
    steps = codec.quantise_logprobs(logprobs, used, step)
    code = codec.encode_ids_by_owner(ids, used, (num_rows,))
    steps, codes = codec.order_ties(steps, code.codes, used)
    levels = codec.steps_to_levels(steps, used).astype(np.uint16)
    stored = codec.subtract_ties(np.ascontiguousarray(codes.T), levels).astype(np.uint16)
    top = codec.decode_scalars(codec.encode_scalars(logprobs[:, 0], step), step)
    slow_codes, slow_logprobs = codec.decode_rows_slowly(stored, levels, top, step=step, ties=True)
    assert np.array_equal(codec.decode_levels(levels, top, step), slow_logprobs)
    codec.add_ties(stored, levels)
    assert np.array_equal(stored, slow_codes)
    assert np.array_equal(stored, codes.T)
    if levels.max(initial=0) <= codec.MAX_PAIRED:
        assert np.array_equal(codec.unpair_levels(codec.pair_levels(levels), topk), levels)


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 17),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1 / 4, 1 / 16, 1 / 22]),
)
def test_no_logprob_moves_more_than_half_a_step(num_rows, topk, seed, step):
    rng = np.random.default_rng(seed)
    _, logprobs = falling_rows(rng, num_rows, topk)
    used = np.ones(logprobs.shape, bool)
    levels = codec.steps_to_levels(codec.quantise_logprobs(logprobs, used, step), used).astype(np.uint16)
    top = codec.decode_scalars(codec.encode_scalars(logprobs[:, 0], step), step)
    error = np.abs(codec.decode_levels(levels, top, step).T - logprobs)
    assert error.max() <= step / 2 + 1e-5
    assert error[:, 0].max() <= step / 32 + 1e-5


def test_temperature_does_not_raise_the_error():
    rng = np.random.default_rng(0)
    _, logprobs = falling_rows(rng, 50, 16)
    used, step = np.ones(logprobs.shape, bool), 1 / 16
    levels = codec.steps_to_levels(codec.quantise_logprobs(logprobs, used, step), used).astype(np.uint16)
    top = codec.decode_scalars(codec.encode_scalars(logprobs[:, 0], step), step)
    back = codec.decode_levels(levels, top, step).T
    for temperature in (1.0, 2.0, 4.0):
        assert np.abs(back / temperature - logprobs / temperature).max() <= step / 2 + 1e-5


def test_equal_logprobs_keep_the_first_choice():
    ids = np.array([[9, 3, 5, 1]], np.int32)
    logprobs = np.full((1, 4), -2.0, np.float32)
    used = np.ones(ids.shape, bool)
    code = codec.encode_ids_by_owner(ids, used, (1,))
    _, codes = codec.order_ties(codec.quantise_logprobs(logprobs, used, 1 / 16), code.codes, used)
    back = code.dictionary[codes]
    assert back[0, 0] == 9
    assert sorted(back[0].tolist()) == [1, 3, 5, 9]


def test_bfloat16_keeps_what_is_bfloat16():
    values = np.array([0.0, 1.0, -3.140625, 1e30, 2.0**-120], np.float32)
    assert np.array_equal(
        codec.from_bfloat16(codec.to_bfloat16(values)),
        codec.from_bfloat16(codec.to_bfloat16(codec.from_bfloat16(codec.to_bfloat16(values)))),
    )
    exact = codec.from_bfloat16(np.arange(0, 0x7F80, 7, dtype=np.uint16))
    assert np.array_equal(codec.from_bfloat16(codec.to_bfloat16(exact)), exact)


def test_scalars_keep_minus_infinity_and_refuse_what_is_too_large():
    values = np.array([-np.inf, 0.0, -1e4, 3.3], np.float32)
    back = codec.decode_scalars(codec.encode_scalars(values, 1 / 16), 1 / 16)
    assert np.isneginf(back[0])
    assert np.abs(back[1:] - values[1:]).max() <= 1 / 512 + 1e-3
    with pytest.raises(DataError, match="too large"):
        codec.encode_scalars(np.array([1e9], np.float32), 1 / 16)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_factor_keeps_the_relation_within_tolerance(positions, rank, seed):
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(rank))
    factor = (rng.normal(size=(positions, rank)) * decay).astype(np.float32)
    scaled = states.encode_factor(factor, 1e-2)
    back = states.decode_factor(scaled.values.T, scaled.scale).T
    dense = np.linalg.norm(factor @ factor.T - back @ back.T) / np.linalg.norm(factor @ factor.T)
    assert states.relation_error(factor, back) == pytest.approx(dense, rel=0.02, abs=1e-5)
    assert dense <= 4e-2
    assert (np.abs(back - factor) <= scaled.scale / 2 * (1 + 1e-5) + 1e-7).all()


def test_a_factor_of_zeros_stays_zero():
    scaled = states.encode_factor(np.zeros((5, 3), np.float32), 1e-3)
    assert not scaled.values.any()
    assert not states.decode_factor(scaled.values.T, scaled.scale).any()


@pytest.mark.parametrize(("encoding", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_hidden_states_keep_their_bound(encoding, bound):
    hidden = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    stored, scale = states.encode_hidden(hidden, encoding)
    back = states.decode_hidden(stored.T, scale).T
    assert (np.abs(back - hidden) <= bound * np.abs(hidden).max(axis=1, keepdims=True) * (1 + 1e-5)).all()
