"""Cases for `forked` that need no engine."""

from pathlib import Path


def works(models: Path, number: str) -> str:
    """Succeeds."""
    return number


def fails(models: Path) -> None:
    """Raises."""
    raise ValueError("the reason why")
