"""Sample order as a pure function: no state, no shared generator.

Which record comes `index`-th depends on `(seed, epoch, index)` and on nothing else, so a resumed run, a
wider one and a single-process run all see the same stream.

    blocks     0 1 2 3 4 5      permuted over the whole cache:  4 1 | 5 0 | 3 2
    windows    of `window_blocks` blocks, their samples permuted together
"""

import numpy as np
from numpy.typing import NDArray


def epoch_order(
    block_offsets: NDArray[np.int64], *, seed: int, epoch: int, window_blocks: int
) -> NDArray[np.int64]:
    """Record indices of one epoch, each exactly once.

    Args:
        block_offsets: [num_blocks + 1] record index at which each block starts.
        seed: Seed of the run.
        epoch: Which pass over the data.
        window_blocks: Blocks whose samples mix; memory holds that many at once.

    Returns:
        [S] record indices; equal arguments, equal order, on every machine.
    """
    blocks = _generator(seed, epoch, 0).permutation(len(block_offsets) - 1)
    sizes = np.diff(block_offsets)
    order = np.empty(int(sizes.sum()), np.int64)
    start = 0
    for window in range(0, len(blocks), window_blocks):
        chosen = blocks[window : window + window_blocks]
        records = np.concatenate([np.arange(block_offsets[b], block_offsets[b + 1]) for b in chosen])
        mixed = records[_generator(seed, epoch, 1 + window).permutation(len(records))]
        order[start : start + len(mixed)] = mixed
        start += len(mixed)
    return order


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """The generator of one permutation: Philox keyed by what it is for."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


def shuffle_distance(
    groups: NDArray[np.int64],
    block_offsets: NDArray[np.int64],
    *,
    window_blocks: int,
    batch: int,
    seed: int = 0,
) -> float:
    """How much less mixed batches are than under a full permutation; 1 is as good.

    The statistic is the mean number of pairs in a batch that share a group (an image, a topic: what lies
    together in the data), relative to its expectation under a full permutation. With blocks of S samples
    and groups inside blocks it is about 1 + (number of blocks) / window_blocks.

    Args:
        groups: [S] which group each record belongs to.
        block_offsets: As for `epoch_order`.
        window_blocks: As for `epoch_order`.
        batch: Samples a batch.
        seed: Seed of the order.
    """
    order = epoch_order(block_offsets, seed=seed, epoch=0, window_blocks=window_blocks)
    num_batches = len(order) // batch
    rows = np.sort(groups[order[: num_batches * batch]].reshape(num_batches, batch), axis=1)
    same = sum(float((rows[:, lag:] == rows[:, :-lag]).sum()) for lag in range(1, batch))
    sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
    chance = (sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1))
    expected = num_batches * batch * (batch - 1) / 2 * float(chance)
    return same / expected
