"""Reading a cache: blocks at bulk speed, records by sample id.

order ──> read_block(b) ──> Block ──> record(i)
open:   index/ if it is there, and the tables of parts sealed after it
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.block import Block
from common.cache.hashing import file_fault
from common.cache.image_files import image_hashes, unpack_image_files
from common.cache.index import Index, Names, decode_names, join, read_index
from common.cache.part import PartReader
from common.cache.places import open_store
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.shard import AGAIN
from common.cache.store import Store
from common.errors import MismatchError, PartCorrupt
from common.record import Record
from schemas.arrays import IMAGE_FILE_ARRAYS, SAMPLE_COLUMNS
from schemas.manifest import Manifest, PartSeal

MAX_OPEN_PARTS: Final = 24
"""Parts whose files stay open; about 25 files each."""


@dataclass(frozen=True, slots=True)
class BlockImages:
    """The image files of a block."""

    uses: Sequence[tuple[str, ...]]
    """SHA-256 of each image of each sample."""
    files: Mapping[str, bytes]
    """SHA-256 → the encoded file."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(len(data) for data in self.files.values())


def scan_parts(store: Store, manifest: Manifest, *, skip: Mapping[int, str] | None = None) -> Index:
    """Read the sample tables of every sealed part that `skip` does not list.

    Raises:
        MismatchError: A part was sealed for another cache.
        PartCorrupt: A table is damaged.
    """
    parts = sorted(sealed_parts(store) - (skip or {}).keys())
    return join([_scan_part(store, manifest, part) for part in parts])


def open_part(store: Store, seal: PartSeal) -> PartReader:
    """Open a part, its attributes held to its seal.

    Raises:
        PartCorrupt: It is not what was sealed.
    """
    if layout.METADATA not in seal.files:
        raise PartCorrupt(f"the seal of part {seal.part} of {store.name} names no attributes; {AGAIN}")
    key = f"{layout.PARTS}/{seal.directory}"
    return PartReader(store, key, seal.files[layout.METADATA].sha256)


def _scan_part(store: Store, manifest: Manifest, part: int) -> Index:
    seal = _read_fitting_seal(store, manifest, part)
    reader = open_part(store, seal)
    texts, tables, counts = [np.zeros(0, np.uint8)], [np.zeros((3, 0), np.int32)], []
    try:
        for block in range(reader.num_blocks):
            columns = reader.read_columns(block, ("sample_columns", "sample_text"))
            texts.append(columns["sample_text"])
            tables.append(columns["sample_columns"][[4, 5, 0]])
            counts.append(columns["sample_columns"].shape[1])
    finally:
        reader.close()
    if sum(counts) != seal.num_records:
        found = f"holds {sum(counts)} records, its seal says {seal.num_records}"
        raise PartCorrupt(f"part {part} of {store.name} {found}; {AGAIN}")
    blocks = np.array([[part] * len(counts), range(len(counts)), counts], np.int32).reshape(3, -1)
    names = Names(np.concatenate(texts), np.concatenate(tables, axis=1))
    return Index({part: seal.directory}, blocks, names)


def _read_fitting_seal(store: Store, manifest: Manifest, part: int) -> PartSeal:
    """The seal of a part of this cache's plan.

    Raises:
        MismatchError: It was sealed for another cache.
        PartCorrupt: The plan has no such part.
    """
    seal = read_seal(store, part)
    if seal.identity_sha256 != layout.identity_sha256(manifest):
        raise MismatchError(
            f"part {part} of {store.name} was sealed for another cache; run `cascache repair`"
        )
    if part >= manifest.num_parts:
        raise PartCorrupt(
            f"part {part} of {store.name} is none of the plan's {manifest.num_parts}; run `cascache repair`"
        )
    return seal


class CacheReader:
    """A cache opened for reading. Safe to use from several threads.

    Args:
        path: Directory of the cache, or a URL such as `s3://bucket/l1`.
        proven: Whether to hold every file to the hash in its seal before its part is first used, and the
            index to all seals. Costs one more pass over each part; over a network it is fetched for that.

    Raises:
        CacheError: There is no cache, or it is damaged.
    """

    def __init__(self, path: str, *, proven: bool = False) -> None:
        self.store = open_store(path)
        self.manifest: Manifest = read_manifest(self.store)
        found = read_index(self.store, self.manifest)
        tail = scan_parts(self.store, self.manifest, skip=found.directories if found else None)
        self._index = join([found, tail]) if found else tail
        counts = self._index.blocks[2].astype(np.int64)
        self.block_offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)])
        self._proven = set[int]() if proven else None
        if proven:
            self._check_index()
        self._open: OrderedDict[int, PartReader] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_samples(self) -> int:
        """Records in the cache."""
        return int(self.block_offsets[-1])

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        return len(self.block_offsets) - 1

    @property
    def complete(self) -> bool:
        """Whether every part of the plan is sealed."""
        return len(self._index.directories) == self.manifest.num_parts

    @cached_property
    def _names(self) -> tuple[list[str], list[str | None]]:
        return decode_names(self._index.names)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Id of every record, in block order."""
        return self._names[0]

    @property
    def kinds(self) -> Sequence[str | None]:
        """Kind of every record, in block order."""
        return self._names[1]

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """[S] length of every record's sequence, in block order."""
        lengths: NDArray[np.int32] = self._index.names.table[2]
        return lengths

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {sample_id: i for i, sample_id in enumerate(self.sample_ids)}

    @cached_property
    def seals(self) -> dict[int, PartSeal]:
        """Seal of every part, by part."""
        return {part: read_seal(self.store, part) for part in sorted(self._index.directories)}

    def index_of(self, sample_id: str) -> int:
        """Record index of a sample.

        Raises:
            KeyError: The cache does not hold it.
        """
        return self._index_of[sample_id]

    def block_of(self, index: int) -> tuple[int, int]:
        """Block of a record, and its place in the block."""
        block = int(np.searchsorted(self.block_offsets, index, side="right")) - 1
        return block, index - int(self.block_offsets[block])

    def read_block(self, block: int) -> Block:
        """Decode one block, checksums verified.

        Raises:
            IndexError: There is no such block.
            PartCorrupt: Its bytes are not what was written.
        """
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} of {self.num_blocks}")
        part, local, _ = self._index.blocks[:, block].tolist()
        reader = self._part(part)
        where = f"block {local} of part {part} of {self.store.name}"
        if local >= reader.num_blocks:
            raise PartCorrupt(f"{where} does not exist; run `cascache finalize` to write the index again")
        names = [name for name in reader.arrays if name not in IMAGE_FILE_ARRAYS]
        columns = reader.read_columns(local, names)
        self._check_names(block, columns, where)
        return Block(columns, reader.info.codings, self.manifest, where)

    def read_images(self, block: int) -> BlockImages:
        """The encoded image files of a block, proven against their hashes.

        Raises:
            IndexError: There is no such block.
            PartCorrupt: Its bytes are not what was written.
        """
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} of {self.num_blocks}")
        part, local, _ = self._index.blocks[:, block].tolist()
        reader, where = self._part(part), f"block {local} of part {part} of {self.store.name}"
        names = ("sample_columns", "sample_text", "sample_images", "image_keys", *IMAGE_FILE_ARRAYS)
        columns = reader.read_columns(local, names)
        self._check_names(block, columns, where)
        hashes, uses = image_hashes(columns), columns.get("sample_images", np.empty(0, np.int32))
        counts = columns["sample_columns"][SAMPLE_COLUMNS.index("num_images")].astype(np.int64)
        fits = not len(uses) or 0 <= int(uses.min()) <= int(uses.max()) < len(hashes)
        if not fits or (counts < 0).any() or int(counts.sum()) != len(uses):
            raise PartCorrupt(f"{where}: a sample names an image that the block lacks; {AGAIN}")
        shown = iter(uses.tolist())
        return BlockImages(
            uses=[tuple(hashes[image] for image in islice(shown, count)) for count in counts.tolist()],
            files=unpack_image_files(columns, where),
        )

    def _check_names(self, block: int, columns: Mapping[str, NDArray[Any]], where: str) -> None:
        """Refuse an index that names other samples than the block holds: it is not covered by seals.

        Raises:
            PartCorrupt: They differ.
        """
        names = self._index.names
        start, stop = self.block_offsets[block : block + 2].tolist()
        first, last = self._text_offsets[block : block + 2].tolist()
        table, text = names.table[:, start:stop], names.text[first:last]
        found = columns["sample_columns"]
        fits = len(found) > 5 and np.array_equal(found[[4, 5, 0]], table)
        if not fits or not np.array_equal(columns["sample_text"], text):
            raise PartCorrupt(
                f"{where} holds other samples than the index says; run `cascache finalize` again"
            )

    @cached_property
    def _text_offsets(self) -> NDArray[np.int64]:
        """[blocks + 1] where each block's ids start in the index's text."""
        sizes = np.maximum(self._index.names.table[:2], 0).sum(axis=0, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        offsets: NDArray[np.int64] = ends[self.block_offsets]
        return offsets

    def read_record(self, sample: str | int) -> Record:
        """Everything about one sample, by id or by record index.

        Raises:
            KeyError: No such sample id.
            IndexError: No such index.
        """
        index = self.index_of(sample) if isinstance(sample, str) else sample
        if not 0 <= index < self.num_samples:
            raise IndexError(f"record {index} of {self.num_samples}")
        block, place = self.block_of(index)
        return self.read_block(block).record(place)

    def _part(self, part: int) -> PartReader:
        with self._lock:
            if part not in self._open:
                seal = _read_fitting_seal(self.store, self.manifest, part)
                if seal.directory != self._index.directories[part]:
                    raise PartCorrupt(
                        f"the index of {self.store.name} has part {part} in {self._index.directories[part]}, "
                        f"its seal in {seal.directory}; run `cascache finalize` to write the index again"
                    )
                self._prove(seal)
                self._open[part] = open_part(self.store, seal)
            self._open.move_to_end(part)
            while len(self._open) > MAX_OPEN_PARTS:
                self._open.popitem(last=False)
            return self._open[part]

    def _prove(self, seal: PartSeal) -> None:
        """Hash a part's files, the first time, in a reader that wants proof.

        Raises:
            PartCorrupt: A file is not the sealed one.
        """
        if self._proven is None or seal.part in self._proven:
            return
        base = f"{layout.PARTS}/{seal.directory}"
        for name, wanted in seal.files.items():
            fault = file_fault(self.store, f"{base}/{name}", wanted.size_bytes, wanted, deep=True)
            if fault is not None:
                raise PartCorrupt(
                    f"{self.store.name}/{base}/{name}: {fault}; run `cascache verify`, then {AGAIN}"
                )
        self._proven.add(seal.part)

    def _check_index(self) -> None:
        """Refuse an index that leaves out what seals say is there.

        Raises:
            PartCorrupt: It does.
        """
        parts, _, counts = self._index.blocks
        held = np.zeros(1 + max(self._index.directories, default=0), np.int64)
        np.add.at(held, parts, counts)
        wrong = [part for part, seal in self.seals.items() if held[part] != seal.num_records]
        if wrong or self.seals.keys() != sealed_parts(self.store):
            raise PartCorrupt(
                f"the index of {self.store.name} does not hold what its seals say (part {wrong[:1]}); run "
                f"`cascache finalize` to write it again"
            )

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for reader in self._open.values():
                reader.close()
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
