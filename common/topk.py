"""Logits → kept ids, log-probabilities and an explicit tail; and back.

    lse_kept = logsumexp of the K largest logits
    lse_tail = logsumexp of all the others, around the (K+1)-th: never 1 − Σ of the kept
    logsumexp = logaddexp(lse_kept, lse_tail)      log_tail = lse_tail − logsumexp

Costs about two reads of the logits: one for the largest of every 16 (the K + 1 best lie in the K + 1
groups with the largest), one for the exponentials. On a CPU a few rows at a time, so that the second
read finds them in the processor's cache. Nothing is cloned. Runs on whatever device holds the logits.

With random draws, the K largest are exact and the rest is sampled from what its exponentials already
say; `common.cache.estimate` holds the definition of those modes.

Axes: N rows, V vocabulary, K kept tokens, H temperatures, n random draws.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GROUP = 16
_CACHED_LOGITS = 2**19
"""Logits worked on at a time on a CPU: 2 MB."""


class SparseRows(NamedTuple):
    """Kept rows on a device; see `common.record.TopK` for the meaning of each."""

    token_ids: Tensor
    """[N, K] int32, by falling logit; 0 where the logit is −inf."""
    logprobs: Tensor
    """[N, K] float32, at temperature 1 over the full vocabulary, nats."""
    log_tail: Tensor
    """[N, H] float32."""
    logsumexp: Tensor
    """[N, H] float32."""
    counts: Tensor | None = None
    """[N, K] int32 draws of each id; None without random draws. With them, K = topk + n slots."""


def sparse_rows(
    logits: Tensor,
    topk: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    mass: float | None = None,
    uniforms: Tensor | None = None,
) -> SparseRows:
    """Keep the `topk` largest logits of every row and the mass of the rest.

    Args:
        logits: [N, V] of any float dtype, possibly a view; not changed.
        topk: K, at most V; 0 only with random draws.
        temperatures: H positive temperatures, the first of them 1.
        mass: Keep fewer than K once they hold this share; the slots left over are unused.
        uniforms: [N, n] float64 in [0, 1): draw n ids from the rest by them, in proportion to probability.

    Raises:
        ValueError: `topk` exceeds the vocabulary, or the first temperature is not 1.
    """
    if not (uniforms is None) <= topk <= logits.shape[-1]:
        raise ValueError(f"topk is {topk}, the vocabulary has {logits.shape[-1]} rows")
    if temperatures[0] != 1.0:
        raise ValueError(f"temperatures start with {temperatures[0]}, wanted 1.0")
    size = _rows_per_pass(logits, draws=uniforms is not None)
    starts = range(0, max(1, len(logits)), size)
    rows = join_rows(
        _sparse_rows(
            logits[start : start + size].float(),
            topk,
            temperatures,
            None if uniforms is None else uniforms[start : start + size],
        )
        for start in starts
    )
    return rows if mass is None else _until_mass(rows, mass, temperatures)


def _rows_per_pass(logits: Tensor, *, draws: bool) -> int:
    if logits.is_cuda:
        return len(logits)
    # A sum's rounding depends on how many rows it runs over, and a draw at the edge of two ids on the sum:
    # one row at a time, what is drawn does not depend on what was computed beside it.
    return 1 if draws else max(1, _CACHED_LOGITS // logits.shape[-1])


def _sparse_rows(
    logits: Tensor, topk: int, temperatures: Sequence[float], uniforms: Tensor | None
) -> SparseRows:
    best, ids = largest(logits, min(topk + 1, logits.shape[-1]))
    kept, ids, pivot = best[:, :topk], ids[:, :topk], best[:, -1:]
    pivot = torch.where(pivot.isfinite(), pivot, torch.zeros_like(pivot))
    scratch = torch.empty_like(logits)
    tails, sums, drawn = [], [], None
    for temperature in temperatures:
        # The kept ones may overflow here: they are taken out before the sum.
        torch.sub(logits, pivot, out=scratch)
        if temperature != 1.0:
            scratch /= temperature
        scratch.exp_().scatter_(-1, ids, 0.0)
        tail = scratch.sum(-1).log_() + pivot[:, 0] / temperature
        total = torch.logaddexp((kept / temperature).logsumexp(-1), tail)
        tails.append(tail - total)
        sums.append(total)
        if temperature == 1.0 and uniforms is not None:
            drawn = _draw(scratch, uniforms)
    logsumexp = torch.stack(sums, -1)
    if drawn is not None:
        kept, ids, counts = _merge(kept, ids, logits.gather(-1, drawn[0]), *drawn)
    logprobs = kept - logsumexp[:, :1]
    token_ids = ids.masked_fill(kept == float("-inf"), 0).to(torch.int32)
    rows = SparseRows(token_ids, logprobs, torch.stack(tails, -1), logsumexp)
    return rows if drawn is None else rows._replace(counts=counts)


def _draw(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n] distinct ids drawn in proportion to the [N, V] mass, and how often each was; 0 where unused."""
    cumulative = mass.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total)
    ids = torch.searchsorted(cumulative, uniforms * total, right=True).minimum(last)
    ids = ids.sort(-1).values
    fresh = torch.ones_like(ids)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slots = fresh.cumsum(-1) - 1
    counts = torch.zeros_like(ids).scatter_add_(-1, slots, (total > 0).long().expand_as(ids))
    return torch.zeros_like(ids).scatter_(-1, slots, ids), counts


def _merge(
    kept: Tensor, ids: Tensor, others: Tensor, drawn: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact and drawn ids together: logits, ids and counts by falling logit."""
    logits = torch.cat([kept, others.masked_fill(counts == 0, float("-inf"))], -1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    every = torch.cat([torch.zeros_like(ids), counts], -1).gather(-1, order).to(torch.int32)
    return logits, torch.cat([ids, drawn], -1).gather(-1, order), every


def _until_mass(rows: SparseRows, mass: float, temperatures: Sequence[float]) -> SparseRows:
    """Give back the slots after the one that reaches `mass`; their mass joins the tail."""
    before = rows.logprobs.double().exp().cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    dropped = before >= mass
    nothing = float("-inf")
    tails = []
    for column, temperature in enumerate(temperatures):
        raw = (rows.logprobs + rows.logsumexp[:, :1]) / temperature - rows.logsumexp[:, column, None]
        joined = raw.masked_fill(~dropped, nothing).logsumexp(-1)
        tails.append(torch.logaddexp(rows.log_tail[:, column], joined))
    return rows._replace(
        token_ids=rows.token_ids.masked_fill(dropped, 0),
        logprobs=rows.logprobs.masked_fill(dropped, nothing),
        log_tail=torch.stack(tails, -1),
    )


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every row and their ids, [N, count] each: `torch.topk`, in less time.

    Only groups with one of the `count` largest maxima can hold one of the `count` largest logits.
    Small vocabularies, where most groups would be read again, go to `torch.topk` at once.
    """
    groups = logits.shape[-1] // _GROUP
    if groups < 4 * count:
        return torch.topk(logits, count, dim=-1)
    even = groups * _GROUP
    maxima = logits[:, :even].view(-1, _GROUP, groups).amax(1)
    chosen = maxima.topk(count, dim=-1, sorted=False).indices
    members = torch.arange(0, even, groups, device=logits.device)
    rest = torch.arange(even, logits.shape[-1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([(chosen[:, :, None] + members).flatten(1), rest], dim=-1)
    best, places = logits.gather(-1, ids).topk(count, dim=-1)
    return best, ids.gather(-1, places)


def join_rows(chunks: Iterable[SparseRows]) -> SparseRows:
    """Rows of several chunks, in order; at least one chunk."""
    together = list(chunks)
    table = [torch.cat(parts) for parts in zip(*(each[:4] for each in together), strict=True)]
    drawn = [each.counts for each in together if each.counts is not None]
    return SparseRows(*table)._replace(counts=torch.cat(drawn) if drawn else None)


def raw_logits(logprobs: NDArray[np.float32], logsumexp: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, K] logits as the head emitted them, from what a cache holds ([N, K] and [N, H])."""
    return logprobs + logsumexp[:, :1]


def kept_mass(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N] probability of the kept ids."""
    mass: NDArray[np.float64] = np.exp(logprobs.astype(np.float64)).sum(-1)
    return mass


def dense_logprobs(
    token_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    vocab_rows: int,
) -> NDArray[np.float64]:
    """[N, V] log-probabilities with the tail spread evenly over the ids that were not kept.

    The inverse of `sparse_rows` when K = V; below it, the flattest distribution that the rows allow.

    Args:
        token_ids: [N, K].
        logprobs: [N, K]; −inf slots are unused.
        log_tail: [N] at temperature 1.
        vocab_rows: V.
    """
    used = np.isfinite(logprobs)
    others = vocab_rows - used.sum(-1)
    with np.errstate(divide="ignore"):
        share = log_tail.astype(np.float64) - np.log(np.maximum(others, 1))
    dense = np.repeat(share[:, None], vocab_rows, axis=1)
    rows, slots = np.nonzero(used)
    dense[rows, token_ids[rows, slots]] = logprobs[rows, slots]
    return dense
