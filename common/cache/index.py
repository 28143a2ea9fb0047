"""The index: what opening a cache needs, in a bounded number of files.

    index/zarr.json          attributes: parts [part, directory, records], checksum
    index/blocks/            [1, 3, B] part, block within the part, records
    index/text/              [1, bytes] sample ids and kinds, one after the other
    index/text_lengths/      [1, 2, S] bytes of each id, of each kind (−1: none)

It repeats what the parts hold; deleting it loses nothing. Parts sealed after it was written are read
from their own tables.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.part import sync_directory, write_shard, write_synced
from common.cache.shard import ShardReader, coding_for
from common.errors import CacheError, PartCorrupt
from schemas.arrays import ArraySpec
from schemas.manifest import Manifest

Array = NDArray[Any]

INDEX_ARRAYS = (
    ArraySpec("blocks", ("int32",), ("column", "B"), "small"),
    ArraySpec("text", ("uint8",), ("byte",), "small"),
    ArraySpec("text_lengths", ("int32",), ("column", "S"), "small"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """Ids and kinds of many samples, undecoded."""

    text: NDArray[np.uint8]
    """Ids and kinds, one after the other."""
    lengths: NDArray[np.int32]
    """[2, S] bytes of each id and kind; −1 for no kind."""


@dataclass(frozen=True, slots=True)
class Index:
    """Where every sample is."""

    directories: dict[int, str]
    """Part → its directory."""
    blocks: NDArray[np.int32]
    """[3, B] part, block within the part, records."""
    names: Names
    """Ids and kinds of all samples, in order of the blocks."""


def join(pieces: Sequence[Index]) -> Index:
    """Indices of several parts as one."""
    return Index(
        directories={part: name for piece in pieces for part, name in piece.directories.items()},
        blocks=np.concatenate([np.zeros((3, 0), np.int32)] + [p.blocks for p in pieces], axis=1),
        names=Names(
            np.concatenate([np.zeros(0, np.uint8)] + [p.names.text for p in pieces]),
            np.concatenate([np.zeros((2, 0), np.int32)] + [p.names.lengths for p in pieces], axis=1),
        ),
    )


def decode_names(names: Names) -> tuple[list[str], list[str | None]]:
    """Ids and kinds as strings.

    Raises:
        PartCorrupt: The text is not UTF-8 or shorter than its lengths say.
    """
    sizes = np.maximum(names.lengths, 0).astype(np.int64)
    ends = np.cumsum(sizes.T.reshape(-1)).reshape(-1, 2)
    if (names.lengths[0] < 0).any() or (len(ends) and ends[-1, 1] != len(names.text)):
        raise PartCorrupt("the table of sample ids contradicts itself; run `cascache verify`")
    data, ids, kinds = bytes(names.text), [], []
    known: dict[bytes, str] = {}
    start = 0
    try:
        for (middle, stop), has_kind in zip(ends.tolist(), (names.lengths[1] >= 0).tolist(), strict=True):
            ids.append(data[start:middle].decode())
            kinds.append(None if not has_kind else _interned(data[middle:stop], known))
            start = stop
    except UnicodeDecodeError as error:
        raise PartCorrupt("a sample id is not UTF-8; run `cascache verify`") from error
    return ids, kinds


def _interned(text: bytes, known: dict[bytes, str]) -> str:
    if text not in known:
        known[text] = text.decode()
    return known[text]


def write_index(root: Path, manifest: Manifest) -> None:
    """Write the index of all sealed parts; replaces an older one."""
    from common.cache.reader import scan_parts

    index = scan_parts(root, manifest)
    arrays: dict[str, Array] = {
        "blocks": index.blocks,
        "text": index.names.text,
        "text_lengths": index.names.lengths,
    }
    working = root / layout.WRITING / f"index-{layout.new_directory(0)}"
    working.mkdir(parents=True)
    for spec in INDEX_ARRAYS:
        _write_array(working / spec.name, arrays[spec.name], spec)
    counts = np.zeros(1 + max(index.directories, default=0), np.int64)
    np.add.at(counts, index.blocks[0], index.blocks[2])
    parts = [[part, name, int(counts[part])] for part, name in sorted(index.directories.items())]
    attributes: dict[str, object] = {
        "identity_sha256": layout.identity_sha256(manifest),
        "num_blocks": index.blocks.shape[1],
        "num_text_bytes": len(index.names.text),
        "num_records": index.names.lengths.shape[1],
        "parts": parts,
    }
    write_synced(working / layout.METADATA, layout.guarded_json(attributes))
    sync_directory(working)
    drop_index(root)
    working.rename(root / layout.INDEX)
    sync_directory(root)


def drop_index(root: Path) -> None:
    """Remove the index: what it says is about to change."""
    shutil.rmtree(root / layout.INDEX, ignore_errors=True)


def _write_array(directory: Path, values: Array, spec: ArraySpec) -> None:
    write_shard(directory, [values.reshape(-1)], [1], coding_for("portable", values.dtype, spec.packing))


def read_index(root: Path, manifest: Manifest) -> Index | None:
    """The index, or None when there is none.

    Raises:
        CacheError: It is damaged or of another cache.
    """
    path = root / layout.INDEX / layout.METADATA
    try:
        attributes = layout.read_guarded_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}); run `cascache finalize` to write it again") from error
    if attributes.get("identity_sha256") != layout.identity_sha256(manifest):
        raise CacheError(f"{path} belongs to another cache; run `cascache finalize` to write it again")
    try:
        return _read_arrays(root / layout.INDEX, attributes)
    except (PartCorrupt, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error}); run `cascache finalize` to write it again") from error


def _read_arrays(directory: Path, attributes: Mapping[str, Any]) -> Index:
    num_records, num_blocks = int(attributes["num_records"]), int(attributes["num_blocks"])
    directories = {int(part): str(name) for part, name, _ in attributes["parts"]}
    blocks = _read_array(directory / "blocks", 3 * num_blocks).reshape(3, -1)
    text = _read_array(directory / "text", int(attributes["num_text_bytes"]))
    lengths = _read_array(directory / "text_lengths", 2 * num_records).reshape(2, -1)
    good = all(layout.is_directory_of(name, part) for part, name in directories.items())
    good = good and set(np.unique(blocks[0]).tolist()) <= directories.keys() and bool((blocks[1:] >= 0).all())
    if not good or int(blocks[2].sum()) != num_records:
        raise ValueError("it contradicts itself")
    return Index(directories, blocks, Names(text, lengths))


def _read_array(directory: Path, length: int) -> Array:
    reader = ShardReader(directory)
    try:
        if length < 0 or length > reader.meta.capacity:
            raise PartCorrupt(f"{directory}: {reader.meta.capacity} values cannot hold {length}")
        return reader.read_block(0, length)
    finally:
        reader.close()
