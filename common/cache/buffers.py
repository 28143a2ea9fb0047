"""Memory that comes back: large arrays without a page fault for every 4 KB of every block.

A block's arrays are a few megabytes each, just what the allocator returns to the system when they are
freed; taking them anew costs more than decoding into them. Here they go to a shelf instead.

    empty([K, N]) ──> array over a lease ──> views anywhere ──> last view dies ──> memory back on the shelf
"""

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAX_SHELF_BYTES: Final = 256 << 20
"""Memory kept for reuse at most; what exceeds it goes back to the system."""

_SMALLEST_BYTES: Final = 64 << 10
_GROWTH: Final = 1.25


class _Lease(np.ndarray[Any, Any]):
    """Memory on loan. NumPy's views skip over plain arrays to whatever is below; they stop at this type."""


class BufferShelf:
    """A bounded store of free memory, by size. Safe to use from several threads."""

    def __init__(self, max_bytes: int = MAX_SHELF_BYTES) -> None:
        self._max_bytes = max_bytes
        self._free: dict[int, list[bytearray]] = {}
        self._num_bytes = 0
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Bytes on the shelf now."""
        return self._num_bytes

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """As `np.empty`: contents are arbitrary. The memory returns when the last view of it dies."""
        kind = np.dtype(dtype)
        num_bytes = math.prod(shape) * kind.itemsize
        if num_bytes < _SMALLEST_BYTES:
            return np.empty(tuple(shape), kind)
        size = _size_class(num_bytes)
        memory = self._take(size)
        lease = _Lease((size,), np.uint8, buffer=memory)
        weakref.finalize(lease, self._put, memory).atexit = False
        return np.ndarray(tuple(shape), kind, buffer=lease)

    def _take(self, size: int) -> bytearray:
        with self._lock:
            if shelf := self._free.get(size):
                self._num_bytes -= size
                return shelf.pop()
        return bytearray(size)

    def _put(self, memory: bytearray) -> None:
        with self._lock:
            if self._num_bytes + len(memory) <= self._max_bytes:
                self._num_bytes += len(memory)
                self._free.setdefault(len(memory), []).append(memory)


def _size_class(num_bytes: int) -> int:
    """The next size on the shelf: within a quarter of what is asked for."""
    steps = math.ceil(math.log(num_bytes / _SMALLEST_BYTES, _GROWTH) - 1e-9)
    return math.ceil(_SMALLEST_BYTES * _GROWTH**steps / 4096) * 4096


SHELF: Final = BufferShelf()
"""The process's shelf."""
