"""Which samples a step sees, as a pure function: nothing is drawn, nothing is remembered.

    stage's samples    epoch 0                 epoch 1
    order              7 2 9 0 4 5 1 │ 3 0 9 7 2 ...       epoch_order(seed, epoch), filtered by kind
    by size            [7 2 9 0] [4 5 1 3] [0 9 7 2] ...   `batch_size` samples, across epochs
    by tokens          [9 1] [7 2 0 5] [4] │ ...           `tokens_per_batch`, like lengths together

Global batches are the same whatever the number of processes, so a stream resumes at any step, at any
number of processes, by being asked for that step.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.cache.order import epoch_order
from common.errors import ConfigError
from common.streams import stream
from student_train.recipe import Stage

SORTED_TOGETHER: Final = 2048
"""Samples whose lengths are sorted together: enough for little padding, few enough to stay shuffled."""


class Described(Protocol):
    """What sampling needs to know of a cache; `common.cache.reader.CacheReader` is one."""

    @property
    def kinds(self) -> Sequence[str | None]:
        """Kind of every sample."""
        ...

    @property
    def block_offsets(self) -> NDArray[np.int64]:
        """[blocks + 1] first sample of every block."""
        ...

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """[S] length of every sample's sequence."""
        ...


def stage_seed(seed: int, level: int, stage: int) -> int:
    """Derive a seed of its own for every stage, so that no two see the same order."""
    digest = hashlib.blake2b(f"{seed}/{level}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Sampler(ABC):
    """The sample indices of every step of one stage."""

    def __init__(self, cache: Described, stage: Stage, *, seed: int, window_blocks: int, where: str) -> None:
        """Select the stage's samples.

        Args:
            cache: What the cache holds.
            stage: Its kind filter and batch size.
            seed: See `stage_seed`.
            window_blocks: Blocks that are mixed with each other.
            where: The cache's path, for messages.

        Raises:
            ConfigError: No sample of the cache is of the stage's kinds.
        """
        self.seed = seed
        self._offsets = cache.block_offsets
        self._window_blocks = window_blocks
        labels = {str(kind): kind for kind in cache.kinds}
        chosen = [label for label, kind in labels.items() if stage.selects(kind)]
        self._selected = np.isin(np.asarray([str(kind) for kind in cache.kinds]), chosen)
        self.num_samples = int(self._selected.sum())
        if not self.num_samples:
            raise ConfigError(
                f"stage {stage.name!r} wants kinds {list(stage.kinds) or 'any'}, {where} has "
                f"{_tell_kinds(cache.kinds)}"
            )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        order = epoch_order(self._offsets, seed=self.seed, epoch=epoch, window_blocks=self._window_blocks)
        return order[self._selected[order]]

    @abstractmethod
    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the global batch of a step.

        Args:
            step: Optimiser step within the stage, from 0.

        Returns:
            [B, 2] (epoch, sample index) in order.
        """

    @abstractmethod
    def steps_of(self, epochs: float) -> int:
        """Return how many steps so many passes over the data take; at least one."""


def _tell_kinds(kinds: Sequence[str | None]) -> str:
    """What kinds a cache has, and what to do about a stage that wants others."""
    named = sorted({kind for kind in kinds if kind is not None})
    if None not in kinds:
        return f"{named}; fix the recipe"
    found = f"{named} and samples without a kind" if named else "samples without a kind"
    return f"{found}; set kinds = [] in the stage, or give samples a kind"


class SizeSampler(Sampler):
    """Batches of a fixed number of samples, which may span epochs."""

    def __init__(self, cache: Described, stage: Stage, *, seed: int, window_blocks: int, where: str) -> None:
        """See `Sampler`."""
        super().__init__(cache, stage, seed=seed, window_blocks=window_blocks, where=where)
        self._size = stage.batch_size

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return entries `[step * size, (step + 1) * size)` of the endless order."""
        entries = np.arange(step * self._size, (step + 1) * self._size)
        epochs, places = np.divmod(entries, self.num_samples)
        batch = np.stack([epochs, places], axis=1)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            batch[here, 1] = self._epoch(int(epoch))[places[here]]
        return batch

    def steps_of(self, epochs: float) -> int:
        """Return the nearest number of whole batches."""
        return max(1, round(epochs * self.num_samples / self._size))


class TokenSampler(Sampler):
    """Batches of at most so many real tokens, samples of like length together."""

    def __init__(self, cache: Described, stage: Stage, *, seed: int, window_blocks: int, where: str) -> None:
        """See `Sampler`.

        Raises:
            ConfigError: A sample alone exceeds the budget.
        """
        super().__init__(cache, stage, seed=seed, window_blocks=window_blocks, where=where)
        assert stage.tokens_per_batch is not None
        self._budget = stage.tokens_per_batch
        self._lengths = cache.num_tokens
        longest = int(self._lengths[self._selected].max())
        if longest > self._budget:
            raise ConfigError(
                f"stage {stage.name!r} wants {self._budget} tokens per batch, {where} has a sample of "
                f"{longest}; raise tokens_per_batch"
            )
        self._batches = lru_cache(maxsize=2)(self._pack_epoch)
        self._starts = [0]
        self._lock = threading.Lock()

    def _pack_epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        order = self._epoch(epoch)
        batches = []
        for start in range(0, len(order), SORTED_TOGETHER):
            window = order[start : start + SORTED_TOGETHER]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += pack(window, self._lengths[window], self._budget)
        shuffled = stream(self.seed, epoch).permutation(len(batches))
        return [batches[place] for place in shuffled]

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the step's batch; epochs before it are packed to know where it lies."""
        with self._lock:  # the stream's threads ask for different steps at once
            while self._starts[-1] <= step:
                self._starts.append(self._starts[-1] + len(self._batches(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        chosen = self._batches(epoch)[step - self._starts[epoch]]
        return np.stack([np.full(len(chosen), epoch), chosen], axis=1)

    def steps_of(self, epochs: float) -> int:
        """Return the batches of whole epochs, and a share of the last one's."""
        whole = [len(self._batches(epoch)) for epoch in range(int(epochs))]
        rest = epochs - len(whole)
        return max(1, sum(whole) + (round(rest * len(self._batches(len(whole)))) if rest else 0))


def pack(samples: NDArray[np.int64], lengths: NDArray[np.int32], budget: int) -> list[NDArray[np.int64]]:
    """Cut samples into runs of at most `budget` tokens, greedily and in order.

    Args:
        samples: [n] sample indices.
        lengths: [n] their lengths, none above the budget.
        budget: Real tokens a run.
    """
    cuts, total = [], 0
    for place, length in enumerate(lengths.tolist()):
        if total + length > budget:
            cuts.append(place)
            total = 0
        total += length
    return np.split(samples, cuts)


def make_sampler(cache: Described, stage: Stage, *, seed: int, window_blocks: int, where: str) -> Sampler:
    """Return the sampler of a stage: by tokens if it names a budget, else by size.

    Raises:
        ConfigError: See `Sampler` and `TokenSampler`.
    """
    kind = SizeSampler if stage.tokens_per_batch is None else TokenSampler
    return kind(cache, stage, seed=seed, window_blocks=window_blocks, where=where)


def choose_positions(
    num: int, keep: int | None, *, seed: int, epoch: int, sample: int, image: int
) -> NDArray[np.int64]:
    """Return which of an image's cached rows a step uses, as a pure function.

    Args:
        num: Rows cached.
        keep: Rows wanted; None or more than `num` keeps all.
        seed: The stage's seed.
        epoch: Pass over the data.
        sample: Index of the sample.
        image: Which of its images.

    Returns:
        Rising indices in [0, num), each subset equally likely.
    """
    if keep is None or keep >= num:
        return np.arange(num)
    draw = stream(seed, (epoch << 48) ^ (sample << 8) ^ image)
    return np.sort(draw.choice(num, keep, replace=False, shuffle=False))
