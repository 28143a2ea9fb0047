"""How many positions an image takes, and how its patches lie among them.

    LLaVA          ■■■■        one square grid
                   ■■■■
    OneVision      ■■ + ■■■■↵  base grid, then the unpadded high-resolution grid whose rows end in a
                   ■■   ■■■■↵  newline token: stride = columns + 1
    Qwen-VL        ■■■■■       merged grid, (height / 2) × (width / 2) patches of the resized image
    InternVL       □□ □□ ■■    crops, then the whole image; its grid alone is a tile, for no other family
                   □□ □□ ■■    cuts an image up that way; a token before and one after, outside the span

OneVision's images are all cut up, several in a sample too: that is what vLLM does, and what the
processor does with a flat list of images (a nested list gets one crop each).

A processor of another family is asked for its number of positions and gets no tiles. Whatever is
computed here is a prediction: the dump compares it with what the teacher saw, sample by sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import DataError
from schemas.sample import Tile


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """One image's positions."""

    num_positions: int
    """P, the length of its image span."""
    tiles: tuple[Tile, ...]
    """Patch grids inside the span; empty where the family's layout is unknown."""
    around: tuple[int, int] | None = None
    """Ids that the processor puts before and after the span, if it does."""


def image_layout(processor: Any, height: int, width: int) -> ImageLayout:
    """Layout of a `height` × `width` pixel image under a transformers processor.

    Args:
        processor: A transformers processor with an image processor.
        height: Pixels.
        width: Pixels.

    Raises:
        DataError: The processor refuses the size (`reason="image-size"`).
    """
    family = _FAMILIES.get(type(processor).__name__, _unknown)
    try:
        return family(processor, height, width)
    except ValueError as error:
        raise DataError(
            f"image of {width} × {height} pixels is refused by {type(processor).__name__}: {error}; "
            "resize or drop it",
            reason="image-size",
        ) from error


def _llava(processor: Any, height: int, width: int) -> ImageLayout:
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", None) else images.size
    rows, columns = size["height"] // processor.patch_size, size["width"] // processor.patch_size
    extra = processor.num_additional_image_tokens
    dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
    positions = rows * columns + extra - dropped
    if extra < dropped:  # a tower without CLS loses its first patch: no grid is left
        return ImageLayout(positions, ())
    return ImageLayout(positions, (Tile(offset=extra - dropped, rows=rows, columns=columns, stride=columns),))


def _onevision(processor: Any, height: int, width: int) -> ImageLayout:
    side = math.isqrt(processor.num_image_tokens)
    base = Tile(offset=0, rows=side, columns=side, stride=side)
    edge = processor.image_processor.size
    edge = edge.get("shortest_edge") or min(edge["height"], edge["width"])
    total = processor._get_number_of_features(height, width, edge, edge)
    rows, columns = _unpadded(processor, height, width, edge)
    if side * side + rows * (columns + 1) != total:
        return ImageLayout(total, (base,))
    fine = Tile(offset=side * side, rows=rows, columns=columns, stride=columns + 1)
    return ImageLayout(total, (base, fine))


def _unpadded(processor: Any, height: int, width: int, edge: int) -> tuple[int, int]:
    """Rows and columns of the high-resolution grid, without newline tokens."""
    from transformers.image_processing_utils import select_best_resolution

    side = math.isqrt(processor.num_image_tokens)
    best_height, best_width = select_best_resolution(
        (height, width), processor.image_processor.image_grid_pinpoints
    )
    patches, newlines = processor._get_unpadded_features(
        height, width, side, side, best_height // edge, best_width // edge
    )
    return newlines, patches // newlines


def _qwen_vl(processor: Any, height: int, width: int) -> ImageLayout:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images = processor.image_processor
    cell = images.patch_size * images.merge_size
    resized_height, resized_width = smart_resize(
        height,
        width,
        factor=cell,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )
    rows, columns = resized_height // cell, resized_width // cell
    return ImageLayout(rows * columns, (Tile(offset=0, rows=rows, columns=columns, stride=columns),))


def _internvl(processor: Any, height: int, width: int) -> ImageLayout:
    num_views = processor.image_processor.get_number_of_image_patches(
        height, width, {"crop_to_patches": True}
    )
    length, side = processor.image_seq_length, math.isqrt(processor.image_seq_length)
    whole = Tile(offset=(num_views - 1) * length, rows=side, columns=side, stride=side)
    around = processor.start_image_token_id, processor.end_image_token_id
    return ImageLayout(num_views * length, (whole,), around)


def _unknown(processor: Any, height: int, width: int) -> ImageLayout:
    counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    return ImageLayout(int(counted["num_image_tokens"][0]), ())


_FAMILIES: dict[str, Callable[[Any, int, int], ImageLayout]] = {
    "LlavaProcessor": _llava,
    "LlavaOnevisionProcessor": _onevision,
    "Qwen2VLProcessor": _qwen_vl,
    "Qwen2_5_VLProcessor": _qwen_vl,
    "Qwen3VLProcessor": _qwen_vl,
    "InternVLProcessor": _internvl,
}
