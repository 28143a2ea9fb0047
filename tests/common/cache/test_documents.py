"""JSON of a hostile cache costs time in proportion to its bytes, whatever they are."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.cache.documents import _TOKENS, parse_document


@given(st.text('"\\\\[a', max_size=40))
@example('"\\')
@example('\\"\\"')
def test_no_quote_is_tried_twice(text):
    """Each would start a scan to the end; none is left between the tokens, so there is one scan."""
    assert b'"' not in _TOKENS.sub(b"", text.encode())


def test_a_string_without_an_end_is_one_token():
    text = b'"' + b'\\"' * 1000
    assert [match.span() for match in _TOKENS.finditer(text)] == [(0, len(text))]
    with pytest.raises(ValueError, match="Unterminated"):
        parse_document(b"[" + text)
