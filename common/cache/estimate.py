"""Sampled distributions: how ids are drawn, and what a drawn id stands for.

    topk          the K largest, exact; the rest is one bucket
    random        n draws from p with counts c:              weight c / n,            unbiased for p
    topk+random   the K' largest exact (count 0), n draws
                  from the rest, p / tail, with counts c:    weight p, tail · c / n,  unbiased for p

With these weights w, Σ w·f(id) is an unbiased estimate of Σ p·f(id) for any f: of the cross-entropy to a
student, and of its gradient, q − Σ w·onehot(id). (Sampling logits without bias: arXiv 2503.16870.)

Axes: N rows, K slots, V vocabulary.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.record import TopK

Sampling = Literal["topk", "random", "topk+random"]


def draw_rows(logits: NDArray[np.float64], *, head: int, draws: int, seed: int) -> TopK:
    """Sample dense rows: the `head` largest exactly, `draws` from the rest. The definition, in plain words.

    Args:
        logits: [N, V].
        head: Ids kept exactly; 0 for the mode `random`.
        draws: Random draws a row.
        seed: Row i draws from a stream of its own, keyed by (seed, i).

    Returns:
        Rows of head + draws slots; drawn ids are distinct, with counts; unused slots have log-prob −inf.
    """
    num_rows, vocab = logits.shape
    width = min(head + draws, vocab)
    peak = logits.max(axis=1, keepdims=True)
    logsumexp = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    logprobs = logits - logsumexp
    ids = np.zeros((num_rows, width), np.int32)
    kept = np.full((num_rows, width), -np.inf)
    counts = np.zeros((num_rows, width), np.int32)
    tails = np.full((num_rows, 1), -np.inf)
    for row in range(num_rows):
        chosen, count, tails[row, 0] = _draw(logprobs[row], head, draws, np.random.Philox(key=[seed, row]))
        order = np.argsort(-logprobs[row][chosen], kind="stable")
        ids[row, : len(chosen)] = chosen[order]
        kept[row, : len(chosen)] = logprobs[row][chosen][order]
        counts[row, : len(chosen)] = count[order]
    positions = np.arange(num_rows, dtype=np.int32)
    logprobs, tails, logsumexp = (a.astype(np.float32) for a in (kept, tails, logsumexp))
    return TopK(positions, ids, logprobs, tails, logsumexp, counts)


def _draw(
    logprobs: NDArray[np.float64], head: int, draws: int, stream: np.random.Philox
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Ids, their counts, and the log of the mass outside the exact head."""
    top = np.argsort(-logprobs, kind="stable")[:head]
    rest = np.exp(logprobs)
    rest[top] = 0.0
    tail = float(rest.sum())
    if tail <= 0 or not draws:
        return top, np.zeros(len(top), np.int32), float(np.log(tail)) if tail > 0 else -np.inf
    drawn, count = np.unique(
        np.random.Generator(stream).choice(len(rest), draws, p=rest / tail), return_counts=True
    )
    return (
        np.concatenate([top, drawn]),
        np.concatenate([np.zeros(len(top), np.int64), count]),
        float(np.log(tail)),
    )


def weights(rows: TopK, sampling: Sampling) -> NDArray[np.float32]:
    """[N, K] what each slot's id counts for: Σ w·f(id) estimates Σ p·f(id).

    In the mode `topk` the tail has no id of its own; its mass is `exp(log_tail)`.

    Raises:
        DataError: A random mode without counts.
    """
    exact: NDArray[np.float64] = np.where(rows.logprobs > -np.inf, np.exp(rows.logprobs), 0.0)
    if sampling == "topk":
        return exact.astype(np.float32)
    if rows.counts is None:
        raise DataError(f"rows sampled by {sampling} need counts; dump them again", reason="counts")
    draws = np.maximum(rows.counts.sum(axis=1, keepdims=True), 1)
    share: NDArray[np.float64] = rows.counts / draws
    if sampling == "random":
        return share.astype(np.float32)
    tail = np.exp(rows.log_tail[:, :1])
    mixed: NDArray[np.float32] = np.where(rows.counts > 0, tail * share, exact).astype(np.float32)
    return mixed
