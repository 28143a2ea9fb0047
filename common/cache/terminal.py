"""Pictures in a terminal: heat maps as Unicode blocks, images as half blocks; and text that stays text."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL.Image import Image

SHADES: Final = " ░▒▓█"
MISSING: Final = "··"
IMAGE_COLUMNS: Final = 48
"""Columns of the terminal that an image takes at most."""


def plain(text: str) -> str:
    """Text from a cache without what a terminal would obey: escapes, bells, reversed writing."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def heat_map(grid: Sequence[Sequence[float | None]], *, low: float, high: float) -> list[str]:
    """One line a row, two columns a cell, darkest at `low`.

    Args:
        grid: Values; None where there is none.
        low: Value of an empty cell.
        high: Value of a full one.
    """
    width = high - low

    def shade(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return MISSING
        share = (value - low) / width if width > 0 else 0.5
        return SHADES[min(len(SHADES) - 1, max(0, int(share * len(SHADES))))] * 2

    return ["".join(shade(value) for value in line) for line in grid]


def half_blocks(image: "Image", *, columns: int = IMAGE_COLUMNS) -> list[str]:
    """An RGB image as coloured half blocks, two pixels a character."""
    width = min(columns, image.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    small = image.resize((width, height)).convert("RGB")
    data = small.tobytes()

    def pixel(x: int, y: int) -> str:
        at = 3 * (y * width + x)
        return ";".join(str(value) for value in data[at : at + 3])

    return [
        "".join(f"\x1b[38;2;{pixel(x, y)};48;2;{pixel(x, y + 1)}m▀" for x in range(width)) + "\x1b[0m"
        for y in range(0, height, 2)
    ]
