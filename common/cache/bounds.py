"""Where things may stand in a sequence: what a writer refuses to seal and a reader to hand out.

    spans       0 ── prompt ── image ── prompt ── response ── T      without a gap, in order
    rows        response: all of `common.spans.response_rows`, or none · visual: inside their image
    images      where their spans are · tiles inside them
    token ids   below the rows of the head

All samples of a block are checked at once: a few vector operations, not a loop.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.arrays import SPAN_KINDS

Array = NDArray[Any]
Ints = NDArray[np.int64]

_IMAGE: Final = SPAN_KINDS.index("image")
_RESPONSE: Final = SPAN_KINDS.index("response")


class Fault(NamedTuple):
    """One thing that stands where it cannot."""

    owner: str
    """`sample` or `image`."""
    number: int
    """Which of the block's samples or images."""
    text: str
    """What is wrong with it."""


class _Samples(NamedTuple):
    """Sample columns of a block, wide enough to add."""

    num_tokens: Ints
    num_images: Ints
    num_rows: Ints
    owner: Ints
    """[spans] sample of each span."""
    kinds: Ints
    starts: Ints
    stops: Ints


def find_fault(columns: Mapping[str, Array], vocab_rows: int) -> Fault | None:
    """The first thing in a block that stands where it cannot, or None.

    Args:
        columns: Array name → values of one block; lengths already fit the counts.
        vocab_rows: Rows of the teacher's head.
    """
    num_tokens, num_spans, num_images, num_rows = columns["sample_columns"][:4].astype(np.int64)
    owner = np.repeat(np.arange(len(num_spans)), num_spans)
    samples = _Samples(num_tokens, num_images, num_rows, owner, *columns["sample_spans"].astype(np.int64))
    return (
        _span_fault(samples, num_spans)
        or _token_fault(columns["sample_tokens"], num_tokens, vocab_rows)
        or _response_fault(samples, columns.get("response_positions", np.empty(0, np.int32)))
        or _image_fault(samples, columns)
    )


def _first(bad: NDArray[np.bool_], owner: Ints | None, kind: str, text: str) -> Fault | None:
    if not bad.any():
        return None
    at = int(bad.argmax())
    return Fault(kind, at if owner is None else int(owner[at]), text)


def _span_fault(s: _Samples, num_spans: Ints) -> Fault | None:
    some, ends = num_spans > 0, np.cumsum(num_spans)
    wanted = np.concatenate([[0], s.stops])[: len(s.starts)]
    wanted[(ends - num_spans)[some]] = 0
    last = np.zeros(len(num_spans), np.int64)
    last[some] = s.stops[ends[some] - 1]
    unknown = (s.kinds < 0) | (s.kinds >= len(SPAN_KINDS))
    return (
        _first(unknown, s.owner, "sample", "has a span of an unknown kind")
        or _first(
            (s.starts != wanted) | (s.stops < s.starts),
            s.owner,
            "sample",
            "has spans with a gap or out of order",
        )
        or _first(last != s.num_tokens, None, "sample", "has spans that do not end where its sequence ends")
    )


def _token_fault(tokens: Array, num_tokens: Ints, vocab_rows: int) -> Fault | None:
    if not tokens.size or 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_rows:
        return None
    bad = (tokens < 0) | (tokens >= vocab_rows)
    owner = np.repeat(np.arange(len(num_tokens)), num_tokens)
    return _first(bad, owner, "sample", f"has a token id outside the vocabulary of {vocab_rows}")


def _response_fault(s: _Samples, positions: Array) -> Fault | None:
    lengths, is_response = s.stops - s.starts, s.kinds == _RESPONSE
    num_samples = len(s.num_tokens)
    answered = np.bincount(s.owner[is_response], lengths[is_response], num_samples).astype(np.int64)
    wrong = (s.num_rows != 0) & (s.num_rows != answered)
    if fault := _first(wrong, None, "sample", "has another number of response rows than response tokens"):
        return fault
    held = is_response & (s.num_rows[s.owner] > 0)
    first, count = s.starts[held] - 1, lengths[held]
    wanted = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
    owner = np.repeat(np.arange(num_samples), s.num_rows)
    bad = (positions != wanted) | (positions < 0)
    return _first(bad, owner, "sample", "has response rows that do not stand one before each response token")


def _image_fault(s: _Samples, columns: Mapping[str, Array]) -> Fault | None:
    is_image = s.kinds == _IMAGE
    spans = np.bincount(s.owner[is_image], minlength=len(s.num_tokens))
    if fault := _first(
        spans != s.num_images, None, "sample", "has another number of images than image spans"
    ):
        return fault
    if "image_columns" not in columns:
        return None
    start, num_positions, num_tiles, num_rows = columns["image_columns"][:4].astype(np.int64)
    uses = columns.get("sample_images", np.empty(0, np.int64))
    moved = start[uses] != s.starts[is_image]
    moved |= num_positions[uses] != (s.stops - s.starts)[is_image]
    rows = np.repeat(np.arange(len(start)), np.maximum(num_rows, 0))
    at = columns.get("visual_positions", np.empty(0, np.int32)) - start[rows]
    owner = np.repeat(np.arange(len(start)), num_tiles)
    tiles = columns.get("image_tiles", np.empty((4, 0), np.int32)).astype(np.int64)
    offset, height, width, stride = tiles
    outside = (offset < 0) | (np.minimum(height, width) < 1) | (stride < width)
    outside |= offset + (height - 1) * stride + width > num_positions[owner]
    return (
        _first((start < 0) | (num_positions < 0), None, "image", "has a negative start or length")
        or _first(moved, s.owner[is_image], "sample", "has an image that is not where its span is")
        or _first((at < 0) | (at >= num_positions[rows]), rows, "image", "has a row outside the image")
        or _first(outside, owner, "image", "has a tile outside the image")
    )
