"""Which samples a step sees, as a pure function: nothing is drawn, nothing is remembered.

    stage's samples    epoch 0                 epoch 1
    order              7 2 9 0 4 5 1 │ 3 0 9 7 2 ...       epoch_order(seed, epoch), filtered by kind
    global batches     [7 2 9 0] [4 5 1 3] [0 9 7 2] ...   the same whatever the number of processes
    process r of R     every R-th entry of a global batch, from the r-th

So a stream resumes at any step by being asked for that step, at any number of processes.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.cache.order import epoch_order
from common.errors import ConfigError
from student_train.recipe import Stage


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


def stage_seed(seed: int, level: int, stage: int) -> int:
    """Derive a seed of its own for every stage, so that no two see the same order."""
    digest = hashlib.blake2b(f"{seed}/{level}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Sampler:
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
        self.batch_size = stage.batch_size
        self._offsets = cache.block_offsets
        self._window_blocks = window_blocks
        kinds = np.asarray([str(kind) for kind in cache.kinds])
        labels = {str(kind): kind for kind in cache.kinds}
        chosen = [label for label, kind in labels.items() if stage.selects(kind)]
        self._selected = np.isin(kinds, chosen)
        self.num_samples = int(self._selected.sum())
        if not self.num_samples:
            raise ConfigError(
                f"stage {stage.name!r} wants kinds {list(stage.kinds) or 'any'}, {where} has "
                f"{sorted(labels)}; mend the recipe"
            )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        order = epoch_order(self._offsets, seed=self.seed, epoch=epoch, window_blocks=self._window_blocks)
        return order[self._selected[order]]

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the global batch of a step.

        Args:
            step: Optimiser step within the stage, from 0.

        Returns:
            [B, 2] (epoch, sample index) in order.
        """
        entries = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(entries, self.num_samples)
        batch = np.stack([epochs, places], axis=1)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            batch[here, 1] = self._epoch(int(epoch))[places[here]]
        return batch


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
    generator = np.random.Generator(np.random.Philox(key=[seed, (epoch << 48) ^ (sample << 8) ^ image]))
    return np.sort(generator.choice(num, keep, replace=False, shuffle=False))
