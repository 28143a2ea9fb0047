r"""Which positions are image, prompt and response, and which rows speak of them.

    token ids   <u>  img img img  what ?  <a>  red <e>  \n
    span        prompt image      prompt       response prompt
    position    0    1   2   3    4    5  6    7   8    9

A response token at position p is predicted by the row at p − 1 (shifted); an image's knowledge is
the rows at its own positions (unshifted).
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.sample import Span, SpanKind


def fill_prompt(spans: Iterable[Span], num_positions: int) -> tuple[Span, ...]:
    """Image and response spans in order, with prompt spans filling every gap.

    Args:
        spans: Image and response spans, in order and without overlap.
        num_positions: T, length of the expanded sequence.

    Returns:
        Spans that cover `[0, T)` in order; adjacent spans are kept apart.
    """
    covered: list[Span] = []
    at = 0
    for span in spans:
        assert at <= span.start < span.stop <= num_positions, (
            f"span {span} overlaps or leaves [0, {num_positions})"
        )
        if span.start > at:
            covered.append(Span(kind="prompt", start=at, stop=span.start))
        covered.append(span)
        at = span.stop
    if at < num_positions:
        covered.append(Span(kind="prompt", start=at, stop=num_positions))
    return tuple(covered)


def positions_of(spans: Iterable[Span], kind: SpanKind) -> NDArray[np.int32]:
    """[N] positions of every span of one kind, in order."""
    ranges = [np.arange(span.start, span.stop, dtype=np.int32) for span in spans if span.kind == kind]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int32)


def response_rows(spans: Iterable[Span]) -> NDArray[np.int32]:
    """[N] rows that predict the response tokens: each response position less one."""
    return positions_of(spans, "response") - np.int32(1)


def expand(
    prompt_ids: NDArray[np.int32], marks: NDArray[np.int64], lengths: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Repeat each image token as often as its image has positions.

    Args:
        prompt_ids: [M] ids with one image token an image.
        marks: [I] indices of the image tokens, rising.
        lengths: Positions of each of the I images.

    Returns:
        [T] expanded ids, and [M + 1] the expanded position at which each prompt id starts (last: T).
    """
    repeats = np.ones(len(prompt_ids), np.int64)
    repeats[marks] = lengths
    starts = np.concatenate([[0], np.cumsum(repeats)])
    return np.repeat(prompt_ids, repeats), starts
