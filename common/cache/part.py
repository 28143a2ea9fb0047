"""One part on disk: blocks of columns to sharded arrays, and back.

columns of B blocks ── pad to the longest ──> [B, ..., C] ── shard ──> parts/00012-9f31c2/<name>/c/0/0
lengths[name][b] stands in the group's attributes; readers cut the padding off again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from common.cache import codec, layout
from common.cache.codec import IdCoding
from common.cache.pack import PackedPart
from common.cache.shard import (
    AGAIN,
    SHARD_NAME,
    Coding,
    ShardReader,
    array_json,
    chunk_checks,
    coding_for,
    encode_shard,
)
from common.cache.store import Store, sync_directory, write_synced
from common.errors import PartCorrupt
from schemas.arrays import ROW_TABLES, ArraySpec, IdScope, array_table

Array = NDArray[Any]
T = TypeVar("T")

MAX_BLOCK_BYTES: Final = 2 << 30
"""No block takes more memory: what an untrusted cache can make a reader hold at once."""

DECODED_ROW_BYTES: Final = 8
"""Bytes of a kept id and its log-prob once decoded."""

WRITE_THREADS: Final = 8
"""Arrays encoded and synced side by side: an fsync waits, it does not compute."""

NETWORK_THREADS: Final = 16
"""Requests in flight for one block of a cache in an object store."""

PAGE_VALUES: Final = 1 << 17
"""Values that share one entropy table, about."""

SHARED_SUFFIX: Final = "_ids_by_rank"
"""Arrays that all blocks of a part share; they lie in block 0."""

PAGES: Final = {"scalars": 1, "scalar_steps": 1, "level_pairs": 1 << 16, "image_factor": 1 << 14}
"""As `PAGE_VALUES`, where neighbouring ranks differ more; one rank at least."""


def write_part_files(directory: Path, part: PackedPart, *, profile: str) -> None:
    """Write a part's group and arrays into an existing, empty directory and sync them.

    Args:
        directory: Where to.
        part: Columns of every block.
        profile: `pcodec` or `portable`.
    """
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        waiting = {}
        for name, spec in array_table().items():
            pieces = [block.get(name) for block in part.blocks]
            if _needed(spec, pieces) and not (spec.name == "kept" and _all_kept(part.blocks, name)):
                waiting[name] = pool.submit(_write_array, directory / name, spec, pieces, profile)
        arrays = {name: future.result() for name, future in waiting.items()}
    codings = {table: asdict(coding) for table, coding in part.codings.items()}
    attributes: dict[str, object] = {"num_blocks": len(part.blocks), "ids": codings, "arrays": arrays}
    write_synced(directory / layout.METADATA, layout.guarded_json(attributes))
    sync_directory(directory)


def _needed(spec: ArraySpec, pieces: Sequence[Array | None]) -> bool:
    """Whether an array holds anything that a reader could not know."""
    held = [piece for piece in pieces if piece is not None]
    return any(piece.size for piece in held) or bool(held and not spec.optional)


def _all_kept(blocks: Sequence[Mapping[str, Array]], name: str) -> bool:
    """Whether every row of the part fills all its slots."""
    codes = [block[name.replace("kept", "codes")] for block in blocks if name in block]
    kept = [block[name] for block in blocks if name in block]
    return min(int(k.min()) for k in kept) == max(len(c) for c in codes)


def _write_array(
    directory: Path, spec: ArraySpec, pieces: Sequence[Array | None], profile: str
) -> dict[str, object]:
    """Write one array; returns what Zarr does not say: used `lengths`, and `ranks` of the axis before."""
    held = [piece for piece in pieces if piece is not None]
    dtype = _narrowest(held, spec)
    ranks = max(len(piece) for piece in held) if len(spec.axes) == 2 else None
    flat = [_flatten(piece, ranks, dtype) for piece in pieces]
    page = [_page(spec, piece.size // (ranks or 1)) for piece in flat]
    data = write_shard(directory, flat, page, coding_for(profile, dtype, spec.packing))
    lengths = [piece.size // (ranks or 1) for piece in flat]
    used: dict[str, object] = {
        "dtype": dtype.name,
        "lengths": lengths,
        "chunks": chunk_checks(data, len(flat)),
    }
    return used if ranks is None else used | {"ranks": ranks}


def _flatten(piece: Array | None, ranks: int | None, dtype: np.dtype[Any]) -> Array:
    """A block's values in one line, rank after rank; missing ranks are zeros."""
    if piece is None:
        return np.zeros(0, dtype)
    if ranks is not None and len(piece) < ranks:
        piece = np.pad(piece, ((0, ranks - len(piece)), (0, 0)))
    return np.ascontiguousarray(piece, dtype).reshape(-1)


def _page(spec: ArraySpec, length: int) -> int:
    """Values that share an entropy table: few ranks where they differ, else many."""
    if len(spec.axes) == 1:
        return PAGE_VALUES
    return max(1, PAGES.get(spec.name, PAGE_VALUES) // max(1, length)) * max(1, length)


def write_shard(directory: Path, pieces: Sequence[Array], page: Sequence[int], coding: Coding) -> bytes:
    """Write one array, metadata and its only shard, into a new directory and sync them; returns the shard."""
    directory.mkdir()
    data, capacity = encode_shard(pieces, page, coding)
    write_synced(directory / SHARD_NAME, data)
    write_synced(directory / layout.METADATA, array_json(pieces[0].dtype, (len(pieces), capacity), coding))
    sync_directory(directory)
    return data


def _narrowest(pieces: Sequence[Array], spec: ArraySpec) -> np.dtype[Any]:
    """The widest type the encoder chose for a block; where it left that open, the first that fits."""
    widest = max((piece.dtype for piece in pieces), key=lambda dtype: dtype.itemsize)
    if (widest.name in spec.dtypes and len(spec.dtypes) > 1) or len(spec.dtypes) == 1:
        return widest if widest.name in spec.dtypes else np.dtype(spec.dtypes[0])
    bounds = np.array([(int(p.min(initial=0)), int(p.max(initial=0))) for p in pieces])
    return codec.smallest(bounds, spec.dtypes).dtype


class PartReader:
    """The open arrays of one part.

    Args:
        store: The cache's files.
        key: The part's directory.
        sha256: Hash of the part's attributes, from its seal; what they say of each chunk binds the rest.

    Raises:
        PartCorrupt: Metadata is damaged, is not what was sealed, or asks for what the format does not have.
    """

    def __init__(self, store: Store, key: str, sha256: str | None = None) -> None:
        self.info = read_part_info(store, f"{key}/{layout.METADATA}", sha256)
        self._is_local = store.is_local
        names = list(self.info.lengths)
        checks = self.info.checks
        opened = self._map(lambda name: ShardReader(store, f"{key}/{name}", checks[name]), names)
        self.arrays: dict[str, ShardReader] = dict(zip(names, opened, strict=True))
        for name, array in self.arrays.items():
            most = max(self.info.lengths[name]) * self.info.ranks.get(name, 1)
            fits = array.meta.num_blocks == self.num_blocks and most <= array.meta.capacity
            if not fits or array.meta.dtype.name != self.info.dtypes[name]:
                found = f"{array.meta.dtype} [{array.meta.num_blocks}, {array.meta.capacity}]"
                wanted = f"{self.num_blocks} blocks of {most} {self.info.dtypes[name]}"
                raise PartCorrupt(f"{array.where}: {found} cannot hold {wanted}; {AGAIN}")
        self._check_memory(f"{store.name}/{key}")

    def _check_memory(self, where: str) -> None:
        """Refuse blocks whose arrays together take more memory than any that a writer makes."""
        total = np.zeros(self.num_blocks, np.int64)
        for name, array in self.arrays.items():
            values = np.array(self.info.lengths[name], np.int64) * self.info.ranks.get(name, 1)
            item = array.meta.dtype.itemsize
            total += values * (item + (DECODED_ROW_BYTES if name.endswith("_codes") else 0))
            total += array.meta.capacity * item if array.meta.coding == "blosc" else 0
        if total.max(initial=0) > MAX_BLOCK_BYTES:
            raise PartCorrupt(
                f"{where}: a block would take {total.max()} bytes, more than {MAX_BLOCK_BYTES}; refused"
            )

    def _map(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Over a network, requests wait side by side; on a disk, one after the other is faster."""
        if self._is_local or len(names) < 2:
            return [work(name) for name in names]
        with ThreadPoolExecutor(NETWORK_THREADS) as pool:
            return list(pool.map(work, names))

    @property
    def num_blocks(self) -> int:
        """Blocks in the part."""
        return self.info.num_blocks

    def read_columns(self, block: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Decode a block's arrays (all, or those named), padding cut off."""
        wanted = [n for n in (self.arrays if names is None else names) if n in self.arrays]
        return dict(zip(wanted, self._map(lambda name: self._read(name, block), wanted), strict=True))

    def _read(self, name: str, block: int) -> Array:
        if name.endswith(SHARED_SUFFIX):
            return self._read_shared(name)
        length, ranks = self.info.lengths[name][block], self.info.ranks.get(name)
        if ranks is None:
            return self.arrays[name].read_block(block, length)
        return self.arrays[name].read_block(block, ranks * length).reshape(ranks, length)

    def _read_shared(self, name: str) -> Array:
        """An array of the whole part, which lies in block 0: decoded once."""
        if name not in self._shared:
            self._shared[name] = self.arrays[name].read_block(0, self.info.lengths[name][0])
        return self._shared[name]

    @cached_property
    def _shared(self) -> dict[str, Array]:
        return {}

    def close(self) -> None:
        """Close every file."""
        for array in self.arrays.values():
            array.close()


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A part's attributes, checked."""

    num_blocks: int
    """Blocks in the part."""
    codings: dict[str, IdCoding]
    """How each table's ids are coded."""
    dtypes: dict[str, str]
    """Type of each array."""
    lengths: dict[str, list[int]]
    """Used length of each array's last axis, block by block."""
    ranks: dict[str, int]
    """Used length of the axis before it, for arrays that have one."""
    checks: dict[str, bytes]
    """Checksums of each array's chunks, 4 bytes a block."""


def read_part_info(store: Store, key: str, sha256: str | None = None) -> PartInfo:
    """Read and check a part's attributes.

    Args:
        store: The cache's files.
        key: The document.
        sha256: Its hash, from the part's seal.

    Raises:
        PartCorrupt: They are missing, not what was sealed, or not of this format.
    """
    path = f"{store.name}/{key}"
    try:
        document = store.read(key)
        if sha256 is not None and hashlib.sha256(document).hexdigest() != sha256:
            raise ValueError("its hash is not the sealed one")
        attributes: dict[str, Any] = layout.read_guarded_json(document)
        arrays = {str(name): dict(used) for name, used in attributes["arrays"].items()}
        info = PartInfo(
            num_blocks=int(attributes["num_blocks"]),
            codings={
                str(t): IdCoding(c["scope"], ranked=bool(c["ranked"]), ties=bool(c["ties"]))
                for t, c in attributes["ids"].items()
            },
            dtypes={name: str(used["dtype"]) for name, used in arrays.items()},
            lengths={name: [int(n) for n in used["lengths"]] for name, used in arrays.items()},
            ranks={name: int(used["ranks"]) for name, used in arrays.items() if "ranks" in used},
            checks={name: bytes.fromhex(used["chunks"]) for name, used in arrays.items()},
        )
    except FileNotFoundError as error:
        raise PartCorrupt(f"{path} is missing though its part is sealed; dump the part again") from error
    except KeyError as error:
        raise PartCorrupt(
            f"{path} lacks {error}: another version of cascache wrote it; read it with that one"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise PartCorrupt(f"{path} is damaged ({error}); dump the part again") from error
    known = array_table()
    bad = [
        n
        for n, v in info.lengths.items()
        if n not in known or len(v) != info.num_blocks or min(v, default=0) < 0
    ]
    two_axes = {n for n in info.lengths.keys() & known.keys() if len(known[n].axes) == 2}
    bad += [n for n, spec in known.items() if info.num_blocks and not spec.optional and n not in info.lengths]
    bad += [n for n, v in info.checks.items() if len(v) != 4 * info.num_blocks]
    bad += [n for n, v in info.ranks.items() if v < 1] + sorted(two_axes ^ info.ranks.keys())
    bad += [n for n in info.lengths.keys() & known.keys() if info.dtypes[n] not in known[n].dtypes]
    bad += [t for t, c in info.codings.items() if t not in ROW_TABLES or c.scope not in get_args(IdScope)]
    if bad:
        raise PartCorrupt(f"{path}: {bad[0]!r} is not of this format; dump the part again")
    return info
