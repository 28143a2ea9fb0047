"""Numbers to shapes: coordinates of histograms and heat maps, which a template draws as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NUM_BINS: Final = 28
WIDTH: Final = 320
HEIGHT: Final = 120
TICKS: Final = 5

CELL: Final = 14
"""Pixels a patch."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Histogram:
    """A chart of `WIDTH` × `HEIGHT`: an outline a level, and ticks below."""

    outlines: tuple[str | None, ...]
    """SVG path of each level; None for one without values."""
    ticks: tuple[tuple[float, str], ...]
    """Place and label."""
    highest: str
    """Share of values in the fullest bin, which touches the top."""


def histogram(
    series: Sequence[Floats],
    *,
    low: float,
    high: float | None = None,
    powers: bool = False,
    whole: bool = False,
) -> Histogram:
    """Shares of each series in common bins.

    Args:
        series: Values of each level.
        low: Where the axis begins; smaller values count in the first bin.
        high: Where it ends; by default at the largest value.
        powers: Label the ticks as powers of ten.
        whole: Values are whole numbers: a bin holds as many of them as every other.
    """
    largest = max((float(values.max()) for values in series if len(values)), default=1.0)
    end = high if high is not None else max(largest, low + 1e-6)
    bins = NUM_BINS
    if whole:
        width = -(-int(largest + 1 - low) // NUM_BINS)
        bins = max(1, -(-int(largest + 1 - low) // width))
        end = low + bins * width
    edges = np.linspace(low, end, bins + 1)
    shares = [
        np.histogram(np.clip(values, low, end), edges)[0] / len(values) if len(values) else None
        for values in series
    ]
    top = max((float(each.max()) for each in shares if each is not None), default=1.0)
    places = np.linspace(0, 1, TICKS)
    if whole:
        places = np.unique(np.round(places * (end - low))) / (end - low)
    labels = [low + place * (end - low) for place in places]
    return Histogram(
        outlines=tuple(None if each is None else _outline(each / top) for each in shares),
        ticks=tuple(
            (float(place) * WIDTH, f"1e{value:.0f}" if powers else f"{value:.3g}")
            for place, value in zip(places, labels, strict=True)
        ),
        highest=f"{100 * top:.0f} %",
    )


def _outline(heights: Floats) -> str:
    """A closed path along the tops of the bins."""
    step = WIDTH / len(heights)
    points = [f"M0 {HEIGHT}"]
    for i, height in enumerate(heights.tolist()):
        y = HEIGHT * (1 - height)
        points.append(f"L{i * step:.1f} {y:.1f}L{(i + 1) * step:.1f} {y:.1f}")
    return "".join([*points, f"L{WIDTH} {HEIGHT}Z"])


def heat_cells(told: dict[str, Any], high: float) -> list[dict[str, Any]]:
    """A map for each tile of each image: size and cells with their opacity.

    Args:
        told: What `describe_record` returned.
        high: The entropy that fills a cell.
    """
    maps = []
    for image in told["images"]:
        for grid in image["entropy_nats"]:
            cells = [
                {"x": CELL * x, "y": CELL * y, "value": f"{value:.2f}", "opacity": f"{value / high:.2f}"}
                for y, line in enumerate(grid)
                for x, value in enumerate(line)
                if value is not None
            ]
            maps.append({"width": CELL * len(grid[0]), "height": CELL * len(grid), "cells": cells})
    return maps
