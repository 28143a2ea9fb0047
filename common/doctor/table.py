"""Checks as a table: one line per check, its cure below it, and a last line that counts them."""

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Final

from common.cache.terminal import plain
from common.doctor.check import Check

_WIDTH: Final = 118
_INDENT: Final = 22
_COLOURS: Final = {"pass": "32", "warn": "33", "fail": "31", "skip": "90"}


def render_check(check: Check, *, colour: bool = False) -> str:
    """The row of a check, with what was wanted and the cure below it where it did not pass."""
    status = f"\x1b[{_COLOURS[check.status]}m{check.status}\x1b[0m" if colour else check.status
    lines = _wrap(f"{check.name:<15}", check.found)
    lines[0] = f"{status}  {lines[0].lstrip()}"
    if check.status in ("warn", "fail"):
        if check.wanted:
            lines += _wrap("wanted", check.wanted)
        lines += _wrap("cure", check.cure)
    return "\n".join(lines)


def _wrap(title: str, text: str) -> list[str]:
    head = f"{'':6}{title:<15} "
    return textwrap.wrap(
        plain(text), _WIDTH, initial_indent=head, subsequent_indent=" " * _INDENT, break_long_words=False
    ) or [head.rstrip()]


def count(checks: Sequence[Check]) -> dict[str, int]:
    """Checks by status."""
    found = Counter(check.status for check in checks)
    return {status: found[status] for status in ("pass", "warn", "fail", "skip")}


def render_end(checks: Sequence[Check], seconds: float, command: str) -> str:
    """How many passed, and what comes next.

    Args:
        checks: All of them.
        seconds: Time they took.
        command: The dump that was checked.
    """
    counts = ", ".join(f"{number} {status}" for status, number in count(checks).items())
    failed = [check.name for check in checks if check.status == "fail"]
    follow = f"repair first: {', '.join(failed)}" if failed else f"next: {command}"
    help_line = "what each line means: docs/gpu.md; for a bug report add --json"
    return f"\n{counts} in {seconds:.0f} s\n{follow}\n{help_line}"


def on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()
