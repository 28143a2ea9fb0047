"""The sampling modes estimate without bias, and survive the cache."""

import dataclasses

import numpy as np
import pytest

from common.cache.estimate import draw_rows, weights
from common.errors import DataError
from tests.common.cache.records import make_manifest, make_record
from tests.common.cache.test_round_trip import write_cache

VOCAB = 40


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def dense_weights(rows, sampling):
    out = np.zeros((len(rows.token_ids), VOCAB))
    np.add.at(out, (np.arange(len(out))[:, None], rows.token_ids), weights(rows, sampling))
    return out


@pytest.mark.parametrize(("sampling", "head"), [("random", 0), ("topk+random", 4)])
def test_the_mean_over_draws_is_the_dense_kl_gradient(sampling, head):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(scale=2, size=(2, 3, VOCAB))
    dense = softmax(student) - softmax(teacher)
    repeats = 4000
    total = np.zeros_like(dense)
    square = np.zeros_like(dense)
    for seed in range(repeats):
        gradient = softmax(student) - dense_weights(
            draw_rows(teacher, head=head, draws=8, seed=seed), sampling
        )
        total += gradient
        square += gradient**2
    mean = total / repeats
    error = np.sqrt(np.maximum(square / repeats - mean**2, 0) / repeats)
    assert (np.abs(mean - dense) <= 5 * error + 1e-6).all()


def test_an_exact_head_lowers_the_variance():
    teacher = np.random.default_rng(1).normal(scale=2, size=(3, VOCAB))
    spread = {}
    for sampling, head in (("random", 0), ("topk+random", 4)):
        rows = [dense_weights(draw_rows(teacher, head=head, draws=8, seed=s), sampling) for s in range(300)]
        spread[sampling] = np.var(rows, axis=0).sum()
    assert spread["topk+random"] < spread["random"]


@pytest.mark.parametrize(("sampling", "head"), [("random", 0), ("topk+random", 4)])
def test_weights_sum_to_one(sampling, head):
    teacher = np.random.default_rng(2).normal(size=(5, VOCAB))
    rows = draw_rows(teacher, head=head, draws=6, seed=3)
    assert weights(rows, sampling).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_topk_weights_are_probabilities():
    rows = draw_rows(np.random.default_rng(0).normal(size=(2, VOCAB)), head=VOCAB, draws=0, seed=0)
    assert weights(rows, "topk").sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_draws_depend_on_seed_and_row_only():
    teacher = np.random.default_rng(2).normal(size=(5, VOCAB))
    whole, part = (draw_rows(teacher[:n], head=0, draws=6, seed=3) for n in (5, 2))
    assert np.array_equal(whole.token_ids[:2], part.token_ids)


def test_random_modes_need_counts():
    rows = draw_rows(np.zeros((1, VOCAB)), head=0, draws=3, seed=0)
    with pytest.raises(DataError, match="counts"):
        weights(dataclasses.replace(rows, counts=None), "random")


@pytest.mark.parametrize("sampling", ["random", "topk+random"])
def test_counts_survive_the_cache(tmp_path, sampling):
    from common.cache.reader import CacheReader

    rng = np.random.default_rng(0)
    rows = draw_rows(
        rng.normal(scale=2, size=(5, VOCAB)), head=0 if sampling == "random" else 3, draws=6, seed=1
    )
    record = make_record(rng, "s", vocab=VOCAB)
    record = dataclasses.replace(
        record, response=dataclasses.replace(rows, positions=record.response.positions)
    )
    manifest = make_manifest(
        num_samples=1,
        vocab=VOCAB,
        topk=9,
        capture={"sampling": sampling, "sampling_draws": 6},
        logits="float32",
    )
    with CacheReader(write_cache(tmp_path / "l1", [record], manifest)) as cache:
        found = cache.read_record("s").response
    used = rows.logprobs > -np.inf
    assert np.array_equal(found.token_ids[used], rows.token_ids[used])
    assert np.array_equal(found.counts[used], rows.counts[used])
    assert np.array_equal(weights(found, sampling), weights(rows, sampling)[:, : found.counts.shape[1]])
