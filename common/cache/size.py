"""How many bytes a level will take, from counts alone.

samples × response rows × (1.7 K + 8) B        ids and logits, as measured at K = 64
images  × image positions × the same           once per image, not per question
images  × image positions × 0.55 · rank B      relation factor; its rank is chosen per image, 68 on average
samples × positions × 2 B                      token ids and the rest
"""

from dataclasses import dataclass
from typing import Final

PORTABLE: Final = 1.4
"""Bytes of the portable profile beside those of pcodec."""
TYPICAL_RANK: Final = 68
STATE_BYTES: Final = {"bfloat16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True, slots=True)
class LevelShape:
    """Counts of a data set as one teacher sees it."""

    samples: float
    """Samples."""
    positions: float
    """Expanded positions per sample."""
    response_rows: float
    """Response rows per sample."""
    images: float
    """Distinct (image, prefix) pairs: as many as images where the prefix is always the same."""
    image_positions: float
    """Positions an image."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a level keeps; the fields mean what they mean in the manifest."""

    topk: int = 64
    """Ids a response row; 0 where none are kept."""
    visual_topk: int = 64
    """Ids an image row."""
    visual_fraction: float = 1.0
    """Share of an image's rows; 0 where none are kept."""
    relation_store: str = "factor"
    """`factor`, `hidden`, `both` or `none`."""
    hidden_size: int = 0
    """Width D of raw states."""
    hidden_encoding: str = "bfloat16"
    """Encoding of raw states."""
    max_rank: int = 128
    """Largest rank of a factor."""
    profile: str = "pcodec"
    """`pcodec` or `portable`."""


def row_bytes(topk: int, profile: str = "pcodec") -> float:
    """Bytes of a row of K ids, log-probs, tail and normaliser."""
    return (1.7 * topk + 8) * (PORTABLE if profile == "portable" else 1.0) if topk else 0.0


def size_bytes(shape: LevelShape, kept: Kept) -> dict[str, int]:
    """Bytes by term: `response`, `visual`, `relation`, `hidden`, `tokens`. Within a factor of two.

    Args:
        shape: Counts.
        kept: What is kept of them.
    """
    at_images = shape.images * shape.image_positions
    rank = min(TYPICAL_RANK, kept.max_rank)
    stores = kept.relation_store
    sizes = {
        "response": shape.samples * shape.response_rows * row_bytes(kept.topk, kept.profile),
        "visual": at_images * kept.visual_fraction * row_bytes(kept.visual_topk, kept.profile),
        "relation": at_images * 0.55 * rank if stores in ("factor", "both") else 0.0,
        "hidden": at_images * kept.hidden_size * STATE_BYTES[kept.hidden_encoding]
        if stores in ("hidden", "both")
        else 0.0,
        "tokens": 2 * shape.samples * shape.positions,
    }
    return {name: round(size) for name, size in sizes.items()}
