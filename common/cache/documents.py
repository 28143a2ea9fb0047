"""JSON from a cache, bounded before it is parsed.

    bytes ── size ── depth, number of containers ── parse: no NaN, no key twice ──> value

A parser takes memory in proportion to the values it makes: `[],` becomes a hundred bytes. So brackets are
counted first, outside strings, and what no writer of ours writes is refused.
"""

import json
import re
from typing import Any, Final, NoReturn

MAX_DEPTH: Final = 32
"""Nested lists and objects; a cache's own documents have at most eight."""

MAX_CONTAINERS: Final = 1 << 20
"""Lists and objects of one document."""

# A string that never ends runs to the end of the text: were it no match, the next quote in it would be tried,
# and the next, in time that grows with the square of the length.
_TOKENS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def parse_document(text: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: It is no JSON, nests deeper than `MAX_DEPTH`, has more than `MAX_CONTAINERS` lists and
            objects, says one key twice, or holds a number that JSON does not have.
    """
    check_nesting(text)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def check_nesting(text: bytes) -> None:
    """Count brackets without parsing.

    Raises:
        ValueError: There are too many, or too many inside each other.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    depth = count = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        if first in b"[{":
            depth, count = depth + 1, count + 1
            if depth > MAX_DEPTH or count > MAX_CONTAINERS:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} or holds over {MAX_CONTAINERS} lists")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
