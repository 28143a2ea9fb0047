"""Narrow encodings of distributions, factors and states, each with its worst error.

    ids        per-block dictionary, most frequent first; codes [K, N]              lossless
    logits     steps      whole steps below the top log-prob, as row differences     step / 2 nats, + float32 rounding
               bfloat16   bits of logit = logprob + logsumexp                        0 where the head emits bfloat16
               float32    log-probs as they are                                      0
    factor     int16 steps of one scale a column                                     scale / 2
    hidden     float32 0 · bfloat16 rounding (0 if the engine computed in it) · int8 scale / 2 a position

Rows lie last: the running sum over ranks and the scaling go over whole rows at vector speed. Ids whose
logits fall on the same step are stored in code order, because which of them is larger is below the error;
the first choice alone keeps its place, so the argmax is exact.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Array = NDArray[Any]

_CODE_BITS = 32


@dataclass(frozen=True, slots=True)
class IdCode:
    """Token ids as codes into a dictionary."""

    dictionary: NDArray[np.int32]
    """[D] ids, most frequent first."""
    codes: NDArray[np.int64]
    """[N, K] index into the dictionary; 0 in unused slots."""


def encode_ids(token_ids: NDArray[np.int32], used: NDArray[np.bool_]) -> IdCode:
    """Rank the ids of a block by frequency; the ranks are small numbers. Lossless.

    Args:
        token_ids: [N, K] ids.
        used: [N, K] which slots count.
    """
    values, inverse, counts = np.unique(token_ids[used], return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values))
    codes = np.zeros(token_ids.shape, np.int64)
    codes[used] = rank[inverse]
    return IdCode(values[order].astype(np.int32), codes)


def decode_ids(dictionary: NDArray[np.int32], codes: Array) -> NDArray[np.int32]:
    """Ids [K, N] of codes [K, N]; codes must be below `len(dictionary)`."""
    return dictionary.take(codes)


def quantise_logprobs(
    logprobs: NDArray[np.float32], used: NDArray[np.bool_], step: float
) -> NDArray[np.int64]:
    """Whole steps [N, K] below each row's top log-prob; 0 in unused slots.

    Worst error of a log-prob: step / 2, and float32 rounding of the product.
    """
    finite = np.where(used, logprobs, 0.0).astype(np.float64)
    return np.where(used, np.rint((finite[:, :1] - finite) / step), 0).astype(np.int64)


def canonical_ties(
    steps: NDArray[np.int64], codes: NDArray[np.int64], used: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Order slots of equal step by code, the first slot and unused slots staying where they are."""
    keys = (steps << _CODE_BITS) | codes
    keys[~used] = np.iinfo(np.int64).max
    keys[:, 1:].sort(axis=1)
    keys[~used] = 0
    return keys >> _CODE_BITS, keys & ((1 << _CODE_BITS) - 1)


def steps_to_levels(steps: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Differences [K − 1, N] from one rank to the next; 0 in unused slots."""
    levels = np.diff(steps, axis=1)
    levels[~used[:, 1:]] = 0
    return np.ascontiguousarray(levels.T)


def decode_levels(levels: Array, top: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Log-probs [K, N] from differences [K − 1, N]: top − step · (running sum), in float32.

    The running sum stays in the stored type, which the encoder chose wide enough.
    """
    num_ranks, num_rows = levels.shape
    out = np.empty((num_ranks + 1, num_rows), np.float32)
    out[0] = top
    total = levels[0].copy() if num_ranks else np.empty(0, np.uint16)
    scale = np.float32(step)
    for rank in range(num_ranks):
        if rank:
            np.add(total, levels[rank], out=total)
        row = out[rank + 1]
        np.multiply(total, scale, out=row, dtype=np.float32, casting="unsafe")
        np.subtract(top, row, out=row)
    return out


def decode_levels_slowly(levels: Array, top: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """The definition of `decode_levels`: one number at a time."""
    out = np.empty((len(levels) + 1, len(top)), np.float32)
    for row in range(len(top)):
        total = 0
        out[0, row] = top[row]
        for rank in range(len(levels)):
            total += int(levels[rank, row])
            out[rank + 1, row] = np.float32(top[row]) - np.float32(np.float32(total) * np.float32(step))
    return out


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper 16 bits, rounded to nearest even. Worst relative error 2⁻⁸; NaN is refused before."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 whose upper half these bits are. Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Whole numbers and what one of them is worth."""

    values: NDArray[np.int16]
    """[P, R] or [P, D] whole steps."""
    scale: NDArray[np.float32]
    """One scale a column (factor) or a row (hidden)."""


def encode_factor(factor: NDArray[np.float32], bits: int = 8) -> Scaled:
    """Each column in steps of its largest value / (2^(bits − 1) − 1). Worst error: scale / 2."""
    peak = np.abs(factor).max(axis=0, initial=0.0)
    scale = (peak / (2 ** (bits - 1) - 1)).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float64)
    return Scaled(np.rint(factor / safe).astype(np.int16), scale)


def encode_int8(hidden: NDArray[np.float32]) -> Scaled:
    """Each position in steps of its largest value / 127. Worst error: scale / 2."""
    peak = np.abs(hidden).max(axis=1, initial=0.0)
    scale = (peak / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
    return Scaled(np.rint(hidden / safe).astype(np.int16), scale)


def smallest(values: Array, dtypes: tuple[str, ...], *, limit: int | None = None) -> Array:
    """Cast to the first type that holds every value (and `limit`, when given).

    Raises:
        DataError: No type does.
    """
    top = max(int(values.max(initial=0)), limit or 0)
    for name in dtypes:
        if top <= np.iinfo(name).max and int(values.min(initial=0)) >= np.iinfo(name).min:
            return values.astype(name)
    raise DataError(
        f"values up to {top} do not fit {dtypes[-1]}; logits this far apart cannot be stored as steps"
    )
