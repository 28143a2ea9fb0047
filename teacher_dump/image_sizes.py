"""Positions that the images of a data set take, from their sizes alone: headers are read, pixels are not.

samples, evenly spaced ──> header of each image ──> height × width ──> image_layout ──> positions
"""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.source import SampleSource
from common.errors import DataError
from common.grids import image_layout
from common.images import image_path
from schemas.sample import ImageRef

_MOST_SAMPLES = 1024
_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """Statistics of the headers."""

    images: int
    """Images whose header was read."""
    per_sample: float
    """Images per sample."""
    mean: float
    """Positions per image."""
    largest: int
    """Positions of the largest."""


def measure_sizes(processor: Any, source: SampleSource, indices: NDArray[np.int64]) -> ImageSizes | None:
    """Positions per image over many samples; None where no image can be read.

    Args:
        processor: The teacher's, which lays out an image of a given size.
        source: The samples.
        indices: Samples to choose from.
    """
    places = np.unique(np.linspace(0, len(indices) - 1, min(len(indices), _MOST_SAMPLES)).astype(np.int64))
    found, samples = [], 0

    @cache
    def positions(size: tuple[int, int]) -> int:
        return image_layout(processor, *size).num_positions

    for index in indices[places]:
        try:
            sizes = [read_size(ref, source.image_root) for ref in source[int(index)].images]
            found += [positions(size) for size in sizes]
            samples += 1
        except DataError:  # counted where bad samples are
            continue
    if not found:
        return None
    return ImageSizes(len(found), len(found) / samples, float(np.mean(found)), max(found))


def read_size(ref: ImageRef, root: str | None = None) -> tuple[int, int]:
    """Height and width of an image, upright, from its header.

    Raises:
        DataError: `image-unreadable`: there is no image.
    """
    from PIL import Image

    path = image_path(ref, root)
    file: Path | io.BytesIO = io.BytesIO(ref.data or b"") if path is None else path
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"image {path or 'inline'} cannot be read: {error}", reason="image-unreadable"
        ) from error
