"""One part on disk: blocks of columns to sharded arrays, and back.

columns of B blocks ── pad to the longest ──> [B, ..., C] ── shard ──> parts/00012-9f31c2/<name>/c/0/0
lengths[name][b] stands in the group's attributes; readers cut the padding off again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache import codec, layout
from common.cache.shard import Coding, ShardReader, array_json, coding_for, encode_shard, shard_name
from common.errors import PartCorrupt
from schemas.arrays import ArraySpec, array_table

Array = NDArray[Any]
Lengths = dict[str, list[int]]

WRITE_THREADS: Final = 8
"""Arrays encoded and synced side by side: an fsync waits, it does not compute."""

RANKS_PER_CHUNK: Final = 8
"""Ranks that share one entropy table."""


def write_part_files(directory: Path, blocks: Sequence[Mapping[str, Array]], *, profile: str) -> None:
    """Write a part's group and arrays into an existing, empty directory and sync them.

    Args:
        directory: Where to.
        blocks: For every block, array name → values with rows last.
        profile: `pcodec` or `portable`.
    """
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        waiting = {}
        for name, spec in array_table().items():
            pieces = [block.get(name) for block in blocks]
            if _needed(spec, pieces) and not (spec.name == "kept" and _all_kept(blocks, name)):
                waiting[name] = pool.submit(_write_array, directory / name, spec, pieces, profile)
        lengths: Lengths = {name: future.result() for name, future in waiting.items()}
    attributes: dict[str, object] = {"num_blocks": len(blocks), "lengths": lengths}
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


def _write_array(directory: Path, spec: ArraySpec, pieces: Sequence[Array | None], profile: str) -> list[int]:
    padded, lengths = pad(pieces, spec)
    chunk = [1, *padded.shape[1:]]
    if padded.ndim == 3:
        ranks = 1 if spec.name == "scalars" else RANKS_PER_CHUNK
        chunk[1] = max(d for d in range(1, min(ranks, chunk[1]) + 1) if padded.shape[1] % d == 0)
    coding: Coding = coding_for(profile, padded.dtype, spec.packing)
    write_shard(directory, padded, chunk, coding, ("block", *spec.axes))
    return lengths


def write_shard(directory: Path, values: Array, chunk: Sequence[int], coding: Coding, axes: Sequence[str]) -> None:
    """Write one array, metadata and its only shard, into a new directory and sync them."""
    directory.mkdir()
    write_synced(directory / shard_name(values.ndim), encode_shard(values, chunk, coding))
    write_synced(directory / layout.METADATA, array_json(values, chunk, coding, axes))
    sync_directory(directory)


def pad(pieces: Sequence[Array | None], spec: ArraySpec) -> tuple[Array, list[int]]:
    """Stack blocks of different lengths, zeros behind the shorter ones.

    Returns:
        The array [B, ..., C], and the used length of each block.
    """
    held = [piece for piece in pieces if piece is not None]
    lengths = [0 if piece is None else piece.shape[-1] for piece in pieces]
    dtype = held[0].dtype
    if len(spec.dtypes) > 1 and dtype.kind in "iu" and dtype.name != "int16":
        top = np.array([int(piece.max(initial=0)) for piece in held] + [_stored_limit(held)])
        dtype = codec.smallest(top, spec.dtypes).dtype
    inner = tuple(max(piece.shape[axis] for piece in held) for axis in range(held[0].ndim - 1))
    out = np.zeros((len(pieces), *inner, max(1, *lengths)), dtype)
    for block, piece in enumerate(pieces):
        if piece is not None:
            where: tuple[int | slice, ...] = (block, *(slice(n) for n in piece.shape))
            out[where] = piece
    return out, lengths


def _stored_limit(pieces: Sequence[Array]) -> int:
    """The largest value that the widest piece's type was chosen for."""
    widest = max(pieces, key=lambda piece: piece.dtype.itemsize).dtype
    return np.iinfo(np.uint16).max + 1 if widest == np.uint32 else 0


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
        self.num_blocks, self.lengths = _read_group(directory / layout.METADATA)
        self.arrays: dict[str, ShardReader] = {}
        for name, lengths in self.lengths.items():
            array = ShardReader(directory / name, name)
            self.arrays[name] = array
            if array.meta.shape[0] != self.num_blocks or max(lengths) > array.meta.shape[-1]:
                raise PartCorrupt(
                    f"{directory / name}: shape {array.meta.shape} does not fit {self.num_blocks} blocks; dump the part again"
                )

    def read_columns(self, block: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Decode a block's arrays (all, or those named), padding cut off."""
        wanted = self.arrays if names is None else [n for n in names if n in self.arrays]
        return {
            name: self.arrays[name].read_block(block)[..., : self.lengths[name][block]] for name in wanted
        }

    def close(self) -> None:
        """Close every file."""
        for array in self.arrays.values():
            array.close()


def _read_group(path: Path) -> tuple[int, Lengths]:
    """Number of blocks and used lengths of a part, checked."""
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        num_blocks, lengths = int(attributes["num_blocks"]), dict(attributes["lengths"])
        counts = {name: [int(n) for n in values] for name, values in lengths.items()}
    except FileNotFoundError as error:
        raise PartCorrupt(f"{path} is missing though its part is sealed; dump the part again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartCorrupt(f"{path} is damaged ({error}); dump the part again") from error
    known = array_table()
    for name, values in counts.items():
        if name not in known or len(values) != num_blocks or min(values, default=0) < 0:
            raise PartCorrupt(f"{path}: {name} is not an array of this format; dump the part again")
    return num_blocks, counts
