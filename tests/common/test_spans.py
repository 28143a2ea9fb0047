"""Spans cover the sequence in order; rows follow from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.spans import expand, fill_prompt, positions_of, response_rows
from schemas.sample import Span


def test_prompt_fills_every_gap():
    spans = fill_prompt([Span(kind="image", start=1, stop=4), Span(kind="response", start=6, stop=8)], 10)
    assert [(span.kind, span.start, span.stop) for span in spans] == [
        ("prompt", 0, 1),
        ("image", 1, 4),
        ("prompt", 4, 6),
        ("response", 6, 8),
        ("prompt", 8, 10),
    ]


@pytest.mark.parametrize("span", [(2, 2), (0, 2), (8, 11)])
def test_overlap_and_overrun_are_bugs(span: tuple[int, int]):
    spans = [Span(kind="image", start=0, stop=2), Span(kind="response", start=span[0], stop=span[1])]
    with pytest.raises(AssertionError):
        fill_prompt(spans, 10)


def test_a_response_token_is_predicted_by_the_row_before_it():
    spans = fill_prompt([Span(kind="response", start=3, stop=5), Span(kind="response", start=7, stop=8)], 9)
    assert positions_of(spans, "response").tolist() == [3, 4, 7]
    assert response_rows(spans).tolist() == [2, 3, 6]


def test_without_a_kind_there_are_no_positions():
    assert positions_of(fill_prompt([], 3), "image").tolist() == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=5), st.integers(0, 4))
def test_expansion_repeats_image_tokens_only(pieces: list[tuple[int, int]], tail: int):
    image = 7
    ids = np.array(
        [token for before, _ in pieces for token in [*range(before), image]] + [1] * tail, np.int32
    )
    marks = np.flatnonzero(ids == image)
    lengths = [length for _, length in pieces]
    expanded, starts = expand(ids, marks, lengths)
    assert len(expanded) == len(ids) - len(marks) + sum(lengths) == starts[-1]
    assert int((expanded == image).sum()) == sum(lengths)
    assert (expanded[starts[:-1]] == ids).all()
    assert (np.diff(starts)[marks] == lengths).all()
