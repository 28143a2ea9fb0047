"""Blocks ahead of their use: worker threads read and decode while the trainer computes.

    numbers   4 1 5 0 ...          yielded in this order, whatever thread finishes first
    workers   [4] [1]              at most `ahead` blocks decoded or in flight

Decoding releases the interpreter for most of its time, so threads are enough, and a block decoded in one
thread is used in another without a copy.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from common.cache.block import Block
from common.cache.reader import CacheReader


def prefetch(
    cache: CacheReader, numbers: Iterable[int], *, threads: int = 1, ahead: int = 2
) -> Iterator[Block]:
    """Blocks in the order of `numbers`, read up to `ahead` blocks early.

    Args:
        cache: Where from.
        numbers: Block numbers; may be endless.
        threads: Worker threads.
        ahead: Blocks waiting or in flight besides the one in use; bounds memory.

    Raises:
        PartCorrupt: At the block whose bytes are damaged, not before.
    """
    source = iter(numbers)
    with ThreadPoolExecutor(threads, thread_name_prefix="cascache-prefetch") as pool:
        waiting: deque[Future[Block]] = deque(pool.submit(cache.read_block, n) for n in islice(source, ahead))
        try:
            while waiting:
                block = waiting.popleft().result()
                waiting.extend(pool.submit(cache.read_block, n) for n in islice(source, 1))
                yield block
        finally:
            for future in waiting:
                future.cancel()
