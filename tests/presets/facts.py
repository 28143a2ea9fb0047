"""The facts of `facts.toml`, one preset at a time: its family's table with what the size has of its own."""

import functools
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("facts.toml")


@functools.cache
def tables() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def families() -> list[str]:
    """Families in the order of the file."""
    return [name for name in tables() if name != "sources"]


def presets(family: str) -> dict[str, Any]:
    """A family's presets as they are written, `same_as` included."""
    found: dict[str, Any] = tables()[family]["presets"]
    return found


def family_of(preset: str) -> str:
    """The family that holds a preset."""
    return next(family for family in families() if preset in presets(family))


def built_as(preset: str) -> str:
    """The preset whose model stands for this one: itself, or the one it equals in all that is kept."""
    same: str = presets(family_of(preset))[preset].get("same_as", preset)
    return same


def facts(preset: str) -> dict[str, Any]:
    """All facts of a preset, `same_as` followed.

    Args:
        preset: Name as in `common.models.PRESETS`.
    """
    family = family_of(preset)
    shared = {name: value for name, value in tables()[family].items() if name != "presets"}
    return {**shared, **presets(family)[built_as(preset)], "family": family}
