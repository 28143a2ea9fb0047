"""Narrow encodings of sparse distributions, each with its worst error.

    ids        ranks in the part; places in a dictionary of a sample, image, block   lossless
    logits     steps      whole steps below the top log-prob                      step / 2 nats
               bfloat16   bits of logit = logprob + logsumexp                     0 if the head emits bfloat16
               float32    log-probs as they are                                   0
    scalars    steps: top log-prob, log-tails, logsumexps in step / 16           step / 32 nats
               else float32                                                       0

Ids whose logits fall on one step are stored in code order and as differences, because which of them is
larger is below the error anyway; the first choice alone keeps its place, so the argmax is exact. Two
differences of neighbouring ranks share one 16-bit number: half the numbers to decode, the same bytes.

Rows lie last, [K, N]: sums over ranks and scaling go over whole rows at vector speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache.buffers import SHELF
from common.errors import DataError
from schemas.arrays import NO_VALUE, SCALARS_PER_LOGIT_STEP, IdScope

Array = NDArray[Any]

MAX_PAIRED: Final = 255
"""Largest level that fits half of a pair."""

_CODE_BITS: Final = 32
_CLASS_RATIO: Final = 3.0


@dataclass(frozen=True, slots=True)
class IdCoding:
    """How a part codes the ids of one table.

    id ──(ranked: its rank of frequency in the part)──> ──(scope: its place in a dictionary)──> code
    """

    scope: IdScope
    """Whose dictionary."""
    ranked: bool
    """Whether dictionaries hold ranks of the part's `ids_by_rank` (plain codes: such ranks), or ids."""
    ties: bool
    """Whether ids on one step are stored as differences."""


@dataclass(frozen=True, slots=True)
class IdCode:
    """Token ids as codes into dictionaries."""

    codes: NDArray[np.int64]
    """[N, K] index into the row's dictionary (or the id itself); 0 in unused slots."""
    dictionary: NDArray[np.int32]
    """[D] ids: most frequent class first, ascending inside a class; all dictionaries, one after the other."""
    sizes: NDArray[np.int32]
    """Entries of each owner's dictionary."""


def build_dictionary(token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """The distinct ids, frequent ones first, so that the codes of most are small numbers.

    Order inside a class of like frequency (a factor of three) costs bytes and gains nothing: there the
    ids ascend.
    """
    values, counts = np.unique(token_ids, return_counts=True)
    frequency = np.floor(np.log(counts) / np.log(_CLASS_RATIO))
    order = np.lexsort((values, -frequency))
    dictionary: NDArray[np.int32] = values[order].astype(np.int32)
    return dictionary


def to_ranks(token_ids: NDArray[np.int32], ids_by_rank: NDArray[np.int32]) -> NDArray[np.int32]:
    """Each id's place in `ids_by_rank`; 0 for ids that are not in it (unused slots)."""
    ranks = np.zeros(1 + max(int(token_ids.max(initial=0)), int(ids_by_rank.max(initial=0))), np.int32)
    ranks[ids_by_rank] = np.arange(len(ids_by_rank), dtype=np.int32)
    return ranks[token_ids]


def encode_ids(token_ids: NDArray[np.int32], used: NDArray[np.bool_], dictionary: NDArray[np.int32]) -> Array:
    """Codes [N, K] of ids that all stand in the dictionary. Lossless."""
    order = np.argsort(dictionary, kind="stable")
    found = np.searchsorted(dictionary[order], token_ids[used])
    codes = np.zeros(token_ids.shape, np.int64)
    codes[used] = order[found]
    return codes


def encode_ids_by_owner(
    token_ids: NDArray[np.int32], used: NDArray[np.bool_], owners: Sequence[int]
) -> IdCode:
    """One dictionary for each run of rows.

    Args:
        token_ids: [N, K] ids.
        used: [N, K] which slots count.
        owners: Rows of each owner, in order.
    """
    codes, dictionaries, start = np.zeros(token_ids.shape, np.int64), [np.empty(0, np.int32)], 0
    for count in owners:
        rows = slice(start, start + count)
        dictionaries.append(build_dictionary(token_ids[rows][used[rows]]))
        codes[rows] = encode_ids(token_ids[rows], used[rows], dictionaries[-1])
        start += count
    sizes = np.array([len(d) for d in dictionaries[1:]], np.int32)
    return IdCode(codes, np.concatenate(dictionaries), sizes)


def decode_ids(codes: Array, dictionary: Array, sizes: Array, owners: Sequence[int]) -> NDArray[np.int32]:
    """Ids [K, N] of codes [K, N], one dictionary for each run of rows.

    Raises:
        IndexError: A code is outside its dictionary.
    """
    out = SHELF.empty(codes.shape, np.int32)
    row = entry = 0
    for count, size in zip(owners, sizes.tolist(), strict=True):
        if count:
            out[:, row : row + count] = look_up(dictionary[entry : entry + size], codes[:, row : row + count])
        row, entry = row + count, entry + size
    return out


def look_up(dictionary: Array, codes: Array) -> Array:
    """Entries by code; rows that keep nothing have no dictionary, and id 0.

    Raises:
        IndexError: A code is outside the dictionary.
    """
    if not len(dictionary) and not codes.any():
        return np.zeros(codes.shape, np.int32)
    return dictionary.take(codes)


def order_ties(steps: NDArray[np.int64], codes: Array, used: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Order slots of equal step by code; the first slot and unused slots stay where they are."""
    keys = (steps << _CODE_BITS) | codes
    keys[~used] = np.iinfo(np.int64).max
    keys[:, 1:].sort(axis=1)
    keys[~used] = 0
    return keys >> _CODE_BITS, keys & ((1 << _CODE_BITS) - 1)


def subtract_ties(codes: Array, levels: Array) -> Array:
    """Codes [K, N] with each one less its predecessor's, wherever both lie on one step."""
    out = codes.copy()
    same = levels[2:] == 0
    out[2:][same] -= codes[1:-1][same]
    return np.maximum(out, 0)


def add_ties(codes: Array, levels: Array) -> None:
    """Undo `subtract_ties` in place: a running sum that starts anew at every step.

    Arithmetic instead of masks: the top bit of `level − 1` is set only where the level is 0, because the
    encoder chose a type in which every level leaves it free.
    """
    if levels.dtype != codes.dtype:
        levels = np.minimum(levels, 1).astype(codes.dtype)
    addend = np.empty(codes.shape[1], codes.dtype)
    one, top_bit = codes.dtype.type(1), codes.dtype.type(8 * codes.itemsize - 1)
    for rank in range(2, len(codes)):
        np.subtract(levels[rank], one, out=addend)
        np.right_shift(addend, top_bit, out=addend)
        np.multiply(addend, codes[rank - 1], out=addend)
        np.add(codes[rank], addend, out=codes[rank])


def quantise_logprobs(
    logprobs: NDArray[np.float32], used: NDArray[np.bool_], step: float
) -> NDArray[np.int64]:
    """Whole steps [N, K] below each row's top log-prob *as it will be decoded*; 0 in unused slots.

    Worst error of a log-prob: step / 2 nats.
    """
    top = decode_scalars(encode_scalars(logprobs[:, :1], step), step)
    finite = np.where(used, logprobs, 0.0).astype(np.float64)
    below = np.where(used, top, 0.0) - finite
    below[:, 0] = 0
    return np.where(used, np.rint(below / step), 0).astype(np.int64)


def steps_to_levels(steps: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Differences [K, N] from one rank to the next; 0 for the first rank and for unused slots."""
    levels = np.diff(steps, axis=1, prepend=0)
    levels[~used] = 0
    return np.ascontiguousarray(levels.T)


def pair_levels(levels: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Two ranks in one number [⌈K / 2⌉, N], the even one below; no level may exceed `MAX_PAIRED`."""
    even = levels[0::2].astype(np.uint16)
    even[: len(levels) // 2] |= levels[1::2].astype(np.uint16) << 8
    return even


def unpair_levels(pairs: NDArray[np.uint16], num_ranks: int) -> NDArray[np.uint16]:
    """Undo `pair_levels`: [K, N]."""
    levels = SHELF.empty((2 * len(pairs), pairs.shape[1]), np.uint16)
    np.bitwise_and(pairs, 0xFF, out=levels[0::2])
    np.right_shift(pairs, 8, out=levels[1::2])
    return levels[:num_ranks]


def decode_levels(levels: Array, top: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Log-probs [K, N] from differences [K, N]: each lies step · level below the one before, in float32.

    Exact where the step is a power of two; else rounding adds up to K units in the last place.
    """
    out = SHELF.empty(levels.shape, np.float32)
    before, scale = top, np.float32(step)
    for level, row in zip(levels, out, strict=True):
        row[:] = level
        np.multiply(row, scale, out=row)
        np.subtract(before, row, out=row)
        before = row
    return out


def decode_rows_slowly(
    codes: Array, levels: Array, top: Array, *, step: float, ties: bool
) -> tuple[Array, Array]:
    """The definition of `add_ties` and `decode_levels`: one number at a time.

    Returns:
        Codes [K, N] and log-probs [K, N].
    """
    plain, logprobs = codes.copy(), np.empty(levels.shape, np.float32)
    for row in range(levels.shape[1]):
        before = np.float32(top[row])
        for rank in range(len(levels)):
            before = before - np.float32(levels[rank, row]) * np.float32(step)
            logprobs[rank, row] = before
            if ties and rank >= 2 and levels[rank, row] == 0:
                plain[rank, row] += plain[rank - 1, row]
    return plain, logprobs


def encode_scalars(values: NDArray[np.float32], step: float) -> NDArray[np.int32]:
    """Whole numbers of step / 16; −inf has a number of its own. Worst error: step / 32.

    Raises:
        DataError: A value is too large for 32 bits.
    """
    finite = np.where(np.isneginf(values), 0.0, values).astype(np.float64)
    steps = np.rint(finite * (SCALARS_PER_LOGIT_STEP / step))
    if np.abs(steps).max(initial=0) >= -NO_VALUE:
        raise DataError(f"a logsumexp of {finite.max()} is too large for steps of {step}", reason="range")
    return np.where(np.isneginf(values), NO_VALUE, steps).astype(np.int32)


def decode_scalars(steps: NDArray[np.int32], step: float) -> NDArray[np.float32]:
    """Undo `encode_scalars`: product in float32."""
    values = steps.astype(np.float32) * np.float32(step / SCALARS_PER_LOGIT_STEP)
    values[steps == NO_VALUE] = -np.inf
    return values


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper 16 bits, rounded to nearest even. Worst relative error 2⁻⁸."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 whose upper half these bits are. Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def smallest(values: Array, dtypes: tuple[str, ...], *, limit: int = 0) -> Array:
    """Cast to the first type that holds every value, and `limit`.

    Raises:
        DataError: No type does.
    """
    top = max(int(values.max(initial=0)), limit)
    for name in dtypes:
        if top <= np.iinfo(name).max and int(values.min(initial=0)) >= np.iinfo(name).min:
            return values.astype(name)
    raise DataError(
        f"values up to {top} do not fit {dtypes[-1]}: logits too far apart for this step", reason="range"
    )
