"""Where the entries of a large JSON file lie: byte ranges, ids and image keys, in flat arrays.

file      [ {"id": "a", ...}, {"id": "b", ...}, ... ]
starts      ^2               ^41
stops                      ^39              ^80
ids       one bytes object and its offsets: about 50 bytes an entry instead of kilobytes
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

Duplicates = Literal["refuse", "number"]
"""What a repeated id means: an error, or `…#2`, `…#3` for its later places."""


class Strings(Sequence[str]):
    """Strings as one buffer and offsets: a read-only list without a Python object an entry."""

    def __init__(self, encoded: bytes, stops: NDArray[np.int64]) -> None:
        self._encoded = encoded
        self._stops = stops

    @classmethod
    def of(cls, strings: Iterator[str] | Sequence[str]) -> "Strings":
        """Pack any strings."""
        encoded, stops = bytearray(), array("q")
        for string in strings:
            encoded += string.encode("utf-8", "surrogatepass")
            stops.append(len(encoded))
        return cls(bytes(encoded), np.array(stops, np.int64))

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._stops[index - 1]) if index else 0
        return self._encoded[start : int(self._stops[index])].decode("utf-8", "surrogatepass")


class IndexBuilder:
    """Gathers an index entry by entry."""

    def __init__(self) -> None:
        self._starts, self._stops, self._keys = array("q"), array("q"), array("q")
        self._ids, self._id_stops = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, stop: int, *, sample_id: str, image_key: int) -> None:
        """Note the entry at bytes `[start, stop)`."""
        self._starts.append(start)
        self._stops.append(stop)
        self._keys.append(image_key)
        self._ids += sample_id.encode("utf-8", "surrogatepass")
        self._id_stops.append(len(self._ids))

    def finish(self, *, path: str, duplicates: Duplicates) -> "Index":
        """The index, its ids checked.

        Raises:
            DataError: `duplicate-id`, naming both places, unless duplicates are numbered.
        """
        ids = unique_ids(
            Strings(bytes(self._ids), np.array(self._id_stops, np.int64)), path=path, duplicates=duplicates
        )
        return Index(
            np.array(self._starts, np.int64),
            np.array(self._stops, np.int64),
            np.array(self._keys, np.int64),
            ids,
        )


class Index:
    """Byte ranges, ids and image keys of a file's entries, in order."""

    def __init__(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64], keys: NDArray[np.int64], ids: Strings
    ) -> None:
        self.starts = starts
        self.stops = stops
        self.image_keys = keys
        self.ids = ids

    def __len__(self) -> int:
        return len(self.starts)


def unique_ids(ids: Strings, *, path: str, duplicates: Duplicates) -> Strings:
    """The ids, none twice.

    Args:
        ids: As the data has them.
        path: The file, for the message.
        duplicates: Refuse repeated ids, or number their later places.

    Raises:
        DataError: `duplicate-id`: the first repetition, with both places.
    """
    repeats = _repeats(ids)
    if not repeats:
        return ids
    if duplicates == "refuse":
        place = min(repeats)
        raise DataError(
            f"{path}: id {ids[place]!r} stands at entry {repeats[place][0]} and again at entry {place} "
            f"({len(repeats)} such entries); ids must be unique: fix them, or write the path as "
            f"{path}#number to read the later ones as {ids[place]}#2 and so on",
            reason="duplicate-id",
        )
    return Strings.of(_numbered(ids, repeats))


def _numbered(ids: Strings, repeats: dict[int, tuple[int, int]]) -> Iterator[str]:
    """The ids with the later places of each numbered from 2; numbers that are already taken are skipped."""
    repeated = {ids[place] for place in repeats}
    taken = {name for name in ids if "#" in name and name.rpartition("#")[0] in repeated}
    next_number = dict.fromkeys(repeated, 2)
    for place, name in enumerate(ids):
        if place not in repeats:
            yield name
            continue
        number = next_number[name]
        while f"{name}#{number}" in taken:
            number += 1
        next_number[name] = number + 1
        yield f"{name}#{number}"


def _repeats(ids: Strings) -> dict[int, tuple[int, int]]:
    """Place of every repeated id → its first place, and how many came before it."""
    hashes = np.fromiter((_hash(name) for name in ids), np.int64, len(ids))
    order = np.argsort(hashes, kind="stable")
    starts_run = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
    repeats: dict[int, tuple[int, int]] = {}
    lengths = np.diff(starts_run, append=len(ids))
    for run in np.flatnonzero(lengths > 1):
        places = order[starts_run[run] : starts_run[run] + lengths[run]]
        seen: dict[str, list[int]] = {}
        for place in map(int, places):
            before = seen.setdefault(ids[place], [])
            if before:
                repeats[place] = (before[0], len(before))
            before.append(place)
    return repeats


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
