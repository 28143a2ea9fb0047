"""A home directory at the start of a path: what the shell expands when nothing is quoted.

--out ~/l1         the shell expands it
--out "~/l1"       here
--cache=~/l1       here: a shell leaves it alone
"~nobody/l1"       stays as it is where there is no such user, as in a shell
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PATHS: Final = frozenset(
    {
        *("ask", "cache", "chat_template", "config", "data", "eval", "first", "image_root", "keep", "key"),
        *("model", "out", "path", "paths", "place", "recipe", "runs", "second", "signature", "sources"),
        *("student", "target", "tokenizer"),
    }
)
"""Settings and arguments that take a path, among other things."""


def expand_home(path: str) -> str:
    """A path with the home directory in place of a leading `~` or `~user`; URLs and all else as they are."""
    if not path.startswith("~") or "://" in path:
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        return path


def expand_homes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, those of `PATHS` expanded, each of them where there are several."""
    return {name: _expand(value) if name in PATHS else value for name, value in values.items()}


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return expand_home(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_expand, value))
    return value
