"""What was loaded lately, kept within a bound and loaded once however many threads ask."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A bounded, thread-safe memory of loaded values; the least recently used goes first."""

    def __init__(self, *, capacity: float, weigh: Callable[[Value], float] | None = None) -> None:
        """Set the bound.

        Args:
            capacity: Largest total weight.
            weigh: Weight of a value; 1 when not given.
        """
        self._capacity = capacity
        self._weigh = weigh
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, tuple[Future[Value], float]] = OrderedDict()
        self._weight = 0.0

    def get(self, key: Key, load: Callable[[], Value]) -> Value:
        """Return the value of a key, loading it if it is not there.

        Args:
            key: What to look up.
            load: Makes the value; its errors reach everyone who waits for it and are not kept.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                future: Future[Value] = Future()
                self._entries[key] = (future, 0.0)
        return entry[0].result() if entry is not None else self._fill(key, load, future)

    def _fill(self, key: Key, load: Callable[[], Value], future: Future[Value]) -> Value:
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            future.set_exception(error)
            raise
        weight = self._weigh(value) if self._weigh else 1.0
        future.set_result(value)
        with self._lock:
            if self._entries.get(key, (None,))[0] is future:  # not put out, nor loaded again, meanwhile
                self._entries[key] = (future, weight)
                self._weight += weight
            while self._weight > self._capacity and self._entries:
                _, (_, gone) = self._entries.popitem(last=False)
                self._weight -= gone
        return value
