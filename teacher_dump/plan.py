"""What is dumped, in which order; pure, nothing is loaded.

    samples    0  1  2  3  4        image of each: a b a – b
    order      0  2  1  4  3        an image's samples are adjacent, in order of first occurrence
    parts      [0 2] [1 4] [3]      runs of `part_samples` plan indices

The order depends on the data alone, so every writer of a level cuts the same parts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LARGEST_PART = {"factor": 1024, "none": 1024, "hidden": 128, "both": 128}
_SMALLEST_PART = 32
_WANTED_PARTS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A run of the plan."""

    index: int
    """Which part."""
    first_sample: int
    """Plan index of its first sample."""
    samples: NDArray[np.int64]
    """Source indices of its samples, in plan order."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts of a level."""

    order: NDArray[np.int64]
    """[S] source index of each plan index."""
    part_samples: int
    """Samples a part, except the last."""

    @property
    def num_parts(self) -> int:
        """Parts of the level."""
        return -(-len(self.order) // self.part_samples)

    def part(self, index: int) -> Part:
        """One part."""
        first = index * self.part_samples
        return Part(index, first, self.order[first : first + self.part_samples])

    def todo(self, sealed: frozenset[int]) -> list[Part]:
        """Parts that are not sealed, in order."""
        return [self.part(index) for index in range(self.num_parts) if index not in sealed]


def make_plan(
    image_keys: NDArray[np.int64],
    *,
    part_samples: int | None,
    store: str,
    limit: int | None = None,
    shuffle_seed: int | None = None,
) -> Plan:
    """Order samples by image and cut them into parts.

    Args:
        image_keys: [S] equal for samples of one image, 0 for samples without one.
        part_samples: Samples a part; None chooses from S and from how much `store` keeps.
        store: `Relation.store`.
        limit: Plan only the first so many samples.
        shuffle_seed: Seed of a random order to take them in; None for the data's own.
    """
    order = np.arange(len(image_keys))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.Philox(key=shuffle_seed)).permutation(order)
    order = order[:limit]
    order = order[group_by_image(image_keys[order])]
    return Plan(order, part_samples or choose_part_samples(len(order), store))


def group_by_image(image_keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """[S] order in which an image's samples stand together, at the place of the first of them."""
    own = np.arange(len(image_keys))
    _, firsts, groups = np.unique(image_keys, return_index=True, return_inverse=True)
    first = np.where(image_keys == 0, own, firsts[groups])
    return np.argsort(first, kind="stable")


def choose_part_samples(num_samples: int, store: str) -> int:
    """Samples a part: about eight parts for small data, bounded by memory for large."""
    even = -(-num_samples // _WANTED_PARTS)
    return max(_SMALLEST_PART, min(_LARGEST_PART[store], even))
