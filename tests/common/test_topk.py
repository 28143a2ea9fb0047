"""Laws of kept rows: nothing is lost between the kept ids and the explicit tail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cache.estimate import Sampling, draw_rows, weights
from common.record import TopK
from common.topk import dense_logprobs, join_rows, kept_mass, largest, raw_logits, sparse_rows

TEMPERATURES = (1.0, 2.0, 0.5)


def logits_of(rows: int, vocab: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits: torch.Tensor, topk: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept log-probs, log tail and logsumexp in float64, the tail as a sum over the others."""
    exact = logits.double() / temperature
    lse = exact.logsumexp(-1)
    ids = logits.topk(topk, dim=-1).indices
    rest = exact.scatter(-1, ids, float("-inf")).logsumexp(-1) - lse
    return (exact.gather(-1, ids) - lse[:, None]).numpy(), rest.numpy(), lse.numpy()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(0.01, 30), st.integers(0, 2**31))
def test_equals_the_float64_oracle(rows: int, vocab: int, scale: float, seed: int):
    logits = logits_of(rows, vocab, scale=scale, seed=seed)
    topk = max(1, vocab // 3)
    found = sparse_rows(logits, topk, temperatures=TEMPERATURES)
    for index, temperature in enumerate(TEMPERATURES):
        logprobs, tail, lse = oracle(logits, topk, temperature)
        np.testing.assert_allclose(found.logsumexp[:, index], lse, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.log_tail[:, index], tail, atol=5e-5, rtol=1e-5)
        if temperature == 1.0:
            np.testing.assert_allclose(found.logprobs, logprobs, atol=2e-5, rtol=1e-5)


def test_a_tail_far_below_the_kept_is_exact():
    logits = torch.full((1, 1000), -200.0)
    logits[0, :4] = 50.0
    found = sparse_rows(logits, 4)
    assert float(found.log_tail[0, 0]) == pytest.approx(-250.0 + np.log(996) - np.log(4), abs=1e-4)


def test_no_tail_when_everything_is_kept():
    found = sparse_rows(logits_of(5, 17), 17, temperatures=TEMPERATURES)
    assert bool((found.log_tail == float("-inf")).all())


@pytest.mark.parametrize("topk", [1, 3, 16])
def test_tail_and_kept_make_one(topk: int):
    found = sparse_rows(logits_of(64, 16), topk)
    total = kept_mass(found.logprobs.numpy()) + np.exp(found.log_tail[:, 0].double().numpy())
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_equal_logits_share_the_mass_evenly():
    found = sparse_rows(torch.full((2, 1024), 7.0), 64)
    np.testing.assert_allclose(found.logprobs, -np.log(1024), atol=1e-6)
    np.testing.assert_allclose(found.log_tail[:, 0], np.log(960 / 1024), atol=1e-6)
    assert all(len(set(row.tolist())) == 64 for row in found.token_ids)


def test_impossible_tokens_are_unused_slots():
    logits = torch.full((1, 8), float("-inf"))
    logits[0, [2, 5]] = torch.tensor([1.0, 2.0])
    found = sparse_rows(logits, 4)
    assert found.token_ids[0].tolist() == [5, 2, 0, 0]
    assert found.logprobs[0, 2:].tolist() == [float("-inf")] * 2
    assert float(found.log_tail[0, 0]) == float("-inf")
    np.testing.assert_allclose(kept_mass(found.logprobs.numpy()), 1, atol=1e-6)


def test_ids_fall_by_logit_and_the_input_is_left_alone():
    logits = logits_of(8, 100)
    before = logits.clone()
    found = sparse_rows(logits, 10)
    assert torch.equal(logits, before)
    assert bool((found.logprobs.diff(dim=-1) <= 0).all())
    assert torch.equal(logits.gather(-1, found.token_ids.long()).argmax(-1), torch.zeros(8, dtype=torch.long))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(2000, 5000), st.integers(1, 9))
def test_two_stage_topk_equals_torch_topk(rows: int, count: int, vocab: int, distinct: int):
    """Also where many logits are equal, in views, and beyond the last whole group."""
    continuous = logits_of(rows, vocab + 3, seed=vocab)
    for logits in (continuous[:, :vocab], continuous[:, :vocab].mul(distinct).round()):
        values, ids = largest(logits, count)
        torch.testing.assert_close(values, logits.topk(count, dim=-1).values, rtol=0, atol=0)
        torch.testing.assert_close(logits.gather(-1, ids), values, rtol=0, atol=0)
        assert all(len(set(row)) == count for row in ids.tolist())


def test_padding_outside_a_view_takes_no_part():
    padded = logits_of(6, 4000)
    padded[:, 3900:] = 1e4
    found, wanted = (sparse_rows(each, 8) for each in (padded[:, :3900], padded[:, :3900].clone()))
    for ours, theirs in zip(found[:4], wanted[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("head", [0, 5])
def test_draws_estimate_without_bias_and_equal_the_definition(head: int, vocab: int):
    """Weights of `common.cache.estimate` on many draws give p back; slots lie as in `draw_rows`."""
    logits, draws = logits_of(1, vocab), 20_000
    uniform = torch.rand(1, draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sparse_rows(logits, head, temperatures=TEMPERATURES, uniforms=uniform)
    assert found.counts is not None
    wanted = draw_rows(logits.double().numpy(), head=head, draws=draws, seed=0)
    used = np.isfinite(found.logprobs[0].numpy())
    ids = found.token_ids[0].numpy()
    assert len(set(ids[used])) == used.sum()
    assert int(found.counts.sum()) == draws
    assert (found.logprobs[0].diff()[: used.sum() - 1] <= 0).all()
    np.testing.assert_allclose(found.log_tail[:, 0], wanted.log_tail[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.logsumexp[:, 0], wanted.logsumexp[:, 0], atol=1e-5)
    exact = ids[:head][found.counts[0, :head].numpy() == 0]
    assert exact.tolist() == wanted.token_ids[0, :head].tolist()
    kept = TopK(np.zeros(1, np.int32), *(each.numpy() for each in found[:4]), counts=found.counts.numpy())
    mode: Sampling = "topk+random" if head else "random"
    estimate = np.zeros(vocab)
    np.add.at(estimate, ids[used], weights(kept, mode)[0][used])
    truth = logits.double().softmax(-1)[0].numpy()
    assert abs(estimate - truth).max() < 5 * np.sqrt(truth.max() / draws)
    assert estimate.sum() == pytest.approx(1, abs=1e-5)


def test_draws_do_not_depend_on_chunks():
    logits = logits_of(64, 9000)
    uniform = torch.rand(64, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = sparse_rows(logits, 4, uniforms=uniform)
    parts = join_rows(
        sparse_rows(each, 4, uniforms=some)
        for each, some in zip(logits.split(7), uniform.split(7), strict=True)
    )
    for found, expected in zip(parts, whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_slots_after_the_wanted_mass_join_the_tail(mass: float):
    logits = logits_of(50, 400)
    whole = sparse_rows(logits, 64, temperatures=TEMPERATURES)
    found = sparse_rows(logits, 64, temperatures=TEMPERATURES, mass=mass)
    used = found.logprobs.isfinite()
    assert torch.equal(found.logprobs[used], whole.logprobs[used])
    assert bool((found.token_ids[~used] == 0).all())
    held = whole.logprobs.double().exp().cumsum(-1)
    assert torch.equal(used.sum(-1), ((held < mass).sum(-1) + 1).clamp_max(64))
    for column, temperature in enumerate(TEMPERATURES):
        raw = (whole.logprobs + whole.logsumexp[:, :1]) / temperature - whole.logsumexp[:, column, None]
        kept = (raw.double().exp() * used).sum(-1) + found.log_tail[:, column].double().exp()
        np.testing.assert_allclose(kept, 1, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_change_nothing(chunk: int):
    logits = logits_of(64, 500)
    whole = sparse_rows(logits, 16, temperatures=TEMPERATURES)
    parts = join_rows(sparse_rows(each, 16, temperatures=TEMPERATURES) for each in logits.split(chunk))
    for found, expected in zip(parts[:4], whole[:4], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_keeping_everything_can_be_undone():
    logits = logits_of(6, 50)
    found = sparse_rows(logits, 50)
    dense = dense_logprobs(found.token_ids.numpy(), found.logprobs.numpy(), found.log_tail[:, 0].numpy(), 50)
    np.testing.assert_allclose(dense, logits.double().log_softmax(-1), atol=1e-5)
    restored = raw_logits(found.logprobs.numpy(), found.logsumexp.numpy())
    np.testing.assert_allclose(restored, logits.sort(descending=True).values, atol=1e-5)


def test_a_spread_tail_still_sums_to_one():
    found = sparse_rows(logits_of(6, 50), 7)
    dense = dense_logprobs(found.token_ids.numpy(), found.logprobs.numpy(), found.log_tail[:, 0].numpy(), 50)
    np.testing.assert_allclose(np.exp(dense).sum(-1), 1, atol=1e-6)


def test_low_precision_logits_are_widened_first():
    logits = logits_of(4, 100).bfloat16()
    for found, expected in zip(sparse_rows(logits, 8)[:4], sparse_rows(logits.float(), 8)[:4], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("topk", "temperatures"), [(0, (1.0,)), (101, (1.0,)), (5, (2.0, 1.0))])
def test_refuses_what_cannot_be_kept(topk: int, temperatures: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"topk|temperatures"):
        sparse_rows(logits_of(2, 100), topk, temperatures=temperatures)
