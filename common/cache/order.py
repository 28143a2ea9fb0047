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
