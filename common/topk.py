"""Logits → kept ids, log-probabilities and an explicit tail; and back.

    lse_kept = logsumexp of the K largest logits
    lse_tail = logsumexp of all the others, around the (K+1)-th: never 1 − Σ of the kept
    logsumexp = logaddexp(lse_kept, lse_tail)      log_tail = lse_tail − logsumexp

Costs about two reads of the logits: one for the largest of every 16 (the K + 1 best lie in the K + 1
groups with the largest), one for the exponentials. On a CPU a few rows at a time, so that the second
read finds them in the processor's cache. Nothing is cloned. Runs on whatever device holds the logits.

Axes: N rows, V vocabulary, K kept tokens, H temperatures.
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


def sparse_rows(logits: Tensor, topk: int, *, temperatures: Sequence[float] = (1.0,)) -> SparseRows:
    """Keep the `topk` largest logits of every row and the mass of the rest.

    Args:
        logits: [N, V] of any float dtype, possibly a view; not changed.
        topk: K, at most V.
        temperatures: H positive temperatures, the first of them 1.

    Raises:
        ValueError: `topk` exceeds the vocabulary, or the first temperature is not 1.
    """
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"topk is {topk}, the vocabulary has {logits.shape[-1]} rows")
    if temperatures[0] != 1.0:
        raise ValueError(f"temperatures start with {temperatures[0]}, wanted 1.0")
    size = max(1, len(logits) if logits.is_cuda else _CACHED_LOGITS // logits.shape[-1])
    starts = range(0, max(1, len(logits)), size)
    return join_rows(
        _sparse_rows(logits[start : start + size].float(), topk, temperatures) for start in starts
    )


def _sparse_rows(logits: Tensor, topk: int, temperatures: Sequence[float]) -> SparseRows:
    best, ids = largest(logits, min(topk + 1, logits.shape[-1]))
    kept, ids, pivot = best[:, :topk], ids[:, :topk], best[:, -1:]
    pivot = torch.where(pivot.isfinite(), pivot, torch.zeros_like(pivot))
    scratch = torch.empty_like(logits)
    tails, sums = [], []
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
    logsumexp = torch.stack(sums, -1)
    logprobs = kept - logsumexp[:, :1]
    token_ids = ids.masked_fill(kept == float("-inf"), 0).to(torch.int32)
    return SparseRows(token_ids, logprobs, torch.stack(tails, -1), logsumexp)


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
    return SparseRows(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


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
