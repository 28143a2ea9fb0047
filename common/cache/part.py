"""One part on disk: blocks of columns to sharded arrays, and back.

columns of B blocks ── pad to the longest ──> [B, ..., C] ── shard ──> parts/00012-9f31c2/<name>/c/0/0
lengths[name][b] stands in the group's attributes; readers cut the padding off again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from common.cache import codec, layout
from common.cache.codec import IdCoding
from common.cache.pack import PackedPart
from common.cache.shard import Coding, ShardReader, array_json, coding_for, encode_shard, shard_name
from common.errors import PartCorrupt
from schemas.arrays import ROW_TABLES, ArraySpec, IdScope, array_table

Array = NDArray[Any]

WRITE_THREADS: Final = 8
"""Arrays encoded and synced side by side: an fsync waits, it does not compute."""

CHUNK_VALUES: Final = {"scalars": 1, "scalar_steps": 1, "level_pairs": 1 << 16, "image_factor": 1 << 14}
"""Values a chunk aims at, where it is not 2¹⁷; one rank at least."""


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
    write_synced(directory / layout.METADATA, layout.group_json(attributes))
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
    padded, used = pad(pieces, spec)
    chunk = [1, *padded.shape[1:]]
    if padded.ndim == 3:
        chunk[1] = _ranks_per_chunk(spec, padded.shape[2])
        extra = -padded.shape[1] % chunk[1]
        padded = np.pad(padded, ((0, 0), (0, extra), (0, 0)))
    write_shard(
        directory, padded, chunk, coding_for(profile, padded.dtype, spec.packing), ("block", *spec.axes)
    )
    return used


def _ranks_per_chunk(spec: ArraySpec, length: int) -> int:
    """Ranks that share one entropy table: few where they differ, more where a table would cost too much."""
    return max(1, CHUNK_VALUES.get(spec.name, 1 << 17) // length)


def write_shard(
    directory: Path, values: Array, chunk: Sequence[int], coding: Coding, axes: Sequence[str]
) -> None:
    """Write one array, metadata and its only shard, into a new directory and sync them."""
    directory.mkdir()
    write_synced(directory / shard_name(values.ndim), encode_shard(values, chunk, coding))
    write_synced(directory / layout.METADATA, array_json(values, chunk, coding, axes))
    sync_directory(directory)


def pad(pieces: Sequence[Array | None], spec: ArraySpec) -> tuple[Array, dict[str, object]]:
    """Stack blocks of different lengths, zeros behind the shorter ones.

    Returns:
        The array [B, ..., C], and what of it is used: `lengths` of the last axis, block by block, and
        `ranks` of the axis before it.
    """
    held = [piece for piece in pieces if piece is not None]
    dtype = held[0].dtype
    if dtype.name not in spec.dtypes or len(spec.dtypes) > 1 and dtype.kind in "iu":
        widest = max(held, key=lambda piece: piece.dtype.itemsize).dtype
        dtype = widest if widest.name in spec.dtypes else _narrowest(held, spec)
    ranks = max(len(piece) for piece in held) if held[0].ndim == 2 else None
    lengths = [0 if piece is None else piece.shape[-1] for piece in pieces]
    out = np.zeros((len(pieces), *(() if ranks is None else (ranks,)), max(1, *lengths)), dtype)
    for block, piece in enumerate(pieces):
        if piece is not None:
            where: tuple[int | slice, ...] = (block, *(slice(n) for n in piece.shape))
            out[where] = piece
    return out, {"lengths": lengths} | ({} if ranks is None else {"ranks": ranks})


def _narrowest(pieces: Sequence[Array], spec: ArraySpec) -> np.dtype[Any]:
    bounds = np.array([(int(p.min(initial=0)), int(p.max(initial=0))) for p in pieces])
    return codec.smallest(bounds, spec.dtypes).dtype


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class PartReader:
    """The open arrays of one part.

    Args:
        directory: The part's directory.

    Raises:
        PartCorrupt: Metadata is damaged, or asks for what the format does not have.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info = read_part_info(directory / layout.METADATA)
        self.arrays: dict[str, ShardReader] = {}
        for name, lengths in self.info.lengths.items():
            array = ShardReader(directory / name, name)
            self.arrays[name] = array
            shape, ranks = array.meta.shape, self.info.ranks.get(name)
            fits = (
                shape[0] == self.num_blocks
                and max(lengths) <= shape[-1]
                and len(shape) == (2 if ranks is None else 3)
            )
            if not fits or (ranks or 0) > shape[1]:
                raise PartCorrupt(
                    f"{directory / name}: shape {shape} is not what {self.num_blocks} blocks need; dump the part again"
                )

    @property
    def num_blocks(self) -> int:
        """Blocks in the part."""
        return self.info.num_blocks

    def read_columns(self, block: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Decode a block's arrays (all, or those named), padding cut off."""
        wanted = self.arrays if names is None else [n for n in names if n in self.arrays]
        return {name: self._read(name, block) for name in wanted}

    def _read(self, name: str, block: int) -> Array:
        table = name.removesuffix("_dictionary")
        if table in self.info.codings and self.info.codings[table].scope == "part":
            return self._part_dictionary(name)
        values = self.arrays[name].read_block(block)
        ranks = self.info.ranks.get(name)
        return (values if ranks is None else values[:ranks])[..., : self.info.lengths[name][block]]

    def _part_dictionary(self, name: str) -> Array:
        """The dictionary that all blocks share, decoded once."""
        if name not in self._shared:
            self._shared[name] = self.arrays[name].read_block(0)[: self.info.lengths[name][0]]
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
    lengths: dict[str, list[int]]
    """Used length of each array's last axis, block by block."""
    ranks: dict[str, int]
    """Used length of the axis before it, for arrays that have one."""


def read_part_info(path: Path) -> PartInfo:
    """Read and check a part's attributes.

    Raises:
        PartCorrupt: They are missing or not of this format.
    """
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        arrays = {str(name): dict(used) for name, used in attributes["arrays"].items()}
        info = PartInfo(
            num_blocks=int(attributes["num_blocks"]),
            codings={str(t): IdCoding(c["scope"], bool(c["ties"])) for t, c in attributes["ids"].items()},
            lengths={name: [int(n) for n in used["lengths"]] for name, used in arrays.items()},
            ranks={name: int(used["ranks"]) for name, used in arrays.items() if "ranks" in used},
        )
    except FileNotFoundError as error:
        raise PartCorrupt(f"{path} is missing though its part is sealed; dump the part again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartCorrupt(f"{path} is damaged ({error}); dump the part again") from error
    known = array_table()
    bad = [
        n
        for n, v in info.lengths.items()
        if n not in known or len(v) != info.num_blocks or min(v, default=0) < 0
    ]
    bad += [n for n, v in info.ranks.items() if v < 1]
    bad += [t for t, c in info.codings.items() if t not in ROW_TABLES or c.scope not in get_args(IdScope)]
    if bad:
        raise PartCorrupt(f"{path}: {bad[0]!r} is not of this format; dump the part again")
    return info
