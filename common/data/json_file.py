"""A data file whose entries are parsed on access: shared by LLaVA JSON and JSONL.

Opening scans the file once (about 90 MB/s) for entry boundaries, ids and image keys; after that a
sample costs one `pread` and one small parse, and the index about 50 bytes.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.data import entries
from common.data.index import Duplicates, Index, IndexBuilder
from common.data.source import NUMBER_SUFFIX, SampleSource, find_image_root
from common.errors import DataError
from schemas.sample import ImageRef, Sample

SHOW_PROGRESS_BYTES = 50 * 2**20


class JsonFile(SampleSource):
    """Entries of one JSON file by byte range."""

    def __init__(self, path: Path, *, image_root: str | None, duplicates: Duplicates = "refuse") -> None:
        self._file = path.absolute()  # a link keeps its own name and directory, as in a hub snapshot
        self.path = str(self._file) + (NUMBER_SUFFIX if duplicates == "number" else "")
        first, index = self._build(duplicates)
        self._index = index
        self.image_root = image_root or find_image_root(self._file.parent, first)

    def _build(self, duplicates: Duplicates) -> tuple[ImageRef | None, Index]:
        """The first image path of the file, and the index."""
        builder, first = IndexBuilder(), None
        size_bytes = self._file.stat().st_size
        quiet = size_bytes < SHOW_PROGRESS_BYTES
        with tqdm(
            total=size_bytes, desc=f"index {self._file.name}", unit="B", unit_scale=True, disable=quiet
        ) as bar:
            for start, stop, entry in self._scan():
                ref = entries.first_reference(entry)
                first = first or (ref if ref is not None and ref.path is not None else None)
                builder.add(
                    start,
                    stop,
                    sample_id=entries.entry_id(entry, len(builder)),
                    image_key=0 if ref is None else entries.reference_key(ref),
                )
                bar.update(stop - bar.n)
        return first, builder.finish(path=str(self._file), duplicates=duplicates)

    @abstractmethod
    def _scan(self) -> Iterator[tuple[int, int, Any]]:
        """Byte range and content of every entry, in order."""

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        start, stop = int(self._index.starts[index]), int(self._index.stops[index])
        sample_id = self._index.ids[index]
        where = f"{self._file}, entry {index} (id {sample_id}, byte {start})"
        try:
            entry = json.loads(os.pread(self._open(), stop - start, start))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: the file changed since it was opened ({error}); open it again", reason="entry"
            ) from error
        return entries.to_sample(entry, sample_id=sample_id, where=where)

    def sample_ids(self) -> Sequence[str]:
        """Ids of all samples in order."""
        return self._index.ids

    def image_keys(self) -> NDArray[np.int64]:
        """[S] hash of each sample's first image reference, 0 without one."""
        return self._index.image_keys

    def _open(self) -> int:
        """The file's descriptor, opened once a process; of two racing threads the later closes its own."""
        found: int | None = self.__dict__.get("_descriptor")
        if found is None:
            mine = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            found = self.__dict__.setdefault("_descriptor", mine)
            if found != mine:
                os.close(mine)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def json_error(file: BinaryIO, name: str, place: int, found: str) -> DataError:
    """A `json` error at byte `place`, its line counted from the start of the file."""
    file.seek(0)
    line, left = 1, place
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        line += chunk.count(b"\n")
        left -= len(chunk)
    return DataError(
        f"{name}, line {line}, byte {place}: {found}; fix the file or write it again", reason="json"
    )
