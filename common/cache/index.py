"""The index: what opening a cache needs, in a bounded number of files.

    index/zarr.json          attributes: parts [part, directory, records], checksum
    index/blocks/            [1, 3, B] part, block within the part, records
    index/text/              [1, bytes] sample ids and kinds, one after the other
    index/samples/           [1, 3, S] bytes of each id, of each kind (−1: none), tokens

It repeats what the parts hold; deleting it loses nothing. Parts sealed after it was written are read
from their own tables.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.part import write_shard
from common.cache.shard import ShardReader, coding_for
from common.cache.store import Store, sync_directory, write_synced
from common.errors import CacheError, PartCorrupt
from schemas.arrays import ArraySpec
from schemas.manifest import Manifest

Array = NDArray[Any]

INDEX_ARRAYS = (
    ArraySpec("blocks", ("int32",), ("column", "B"), "small"),
    ArraySpec("text", ("uint8",), ("byte",), "small"),
    ArraySpec("samples", ("int32",), ("column", "S"), "small"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """Ids, kinds and lengths of many samples, undecoded."""

    text: NDArray[np.uint8]
    """Ids and kinds, one after the other."""
    table: NDArray[np.int32]
    """[3, S] bytes of each id and kind (−1: no kind), tokens of each sequence."""


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
            np.concatenate([np.zeros((3, 0), np.int32)] + [p.names.table for p in pieces], axis=1),
        ),
    )


def decode_names(names: Names) -> tuple[list[str], list[str | None]]:
    """Ids and kinds as strings.

    Raises:
        PartCorrupt: The text is not UTF-8 or shorter than its lengths say.
    """
    sizes = np.maximum(names.table[:2], 0).astype(np.int64)
    ends = np.cumsum(sizes.T.reshape(-1)).reshape(-1, 2)
    if (names.table[0] < 0).any() or (len(ends) and ends[-1, 1] != len(names.text)):
        raise PartCorrupt("the table of sample ids contradicts itself; run `cascache verify`")
    data = bytes(names.text)
    starts, middles, stops = [0, *ends[:-1, 1].tolist()], ends[:, 0].tolist(), ends[:, 1].tolist()
    try:
        if data.isascii():
            text = data.decode()
            ids = [text[a:b] for a, b in zip(starts, middles, strict=False)]
        else:
            ids = [data[a:b].decode() for a, b in zip(starts, middles, strict=False)]
        known = {kind: kind.decode() for kind in {data[a:b] for a, b in zip(middles, stops, strict=True)}}
    except UnicodeDecodeError as error:
        raise PartCorrupt("a sample id is not UTF-8; run `cascache verify`") from error
    has_kind = (names.table[1] >= 0).tolist()
    kinds = [known[data[a:b]] if has else None for a, b, has in zip(middles, stops, has_kind, strict=True)]
    return ids, kinds


def write_index(store: Store, manifest: Manifest, index: Index) -> None:
    """Write the index of all sealed parts; replaces an older one."""
    arrays: dict[str, Array] = {
        "blocks": index.blocks,
        "text": index.names.text,
        "samples": index.names.table,
    }
    working = store.working() / f"index-{layout.new_directory(0)}"
    working.mkdir(parents=True)
    for spec in INDEX_ARRAYS:
        flat = arrays[spec.name].reshape(-1)
        write_shard(working / spec.name, [flat], [1], coding_for("portable", flat.dtype, spec.packing))
    counts = np.zeros(1 + max(index.directories, default=0), np.int64)
    np.add.at(counts, index.blocks[0], index.blocks[2])
    attributes: dict[str, object] = {
        "identity_sha256": layout.identity_sha256(manifest),
        "num_blocks": index.blocks.shape[1],
        "num_text_bytes": len(index.names.text),
        "num_records": index.names.table.shape[1],
        "parts": [[part, name, int(counts[part])] for part, name in sorted(index.directories.items())],
    }
    write_synced(working / layout.METADATA, layout.guarded_json(attributes))
    sync_directory(working)
    drop_index(store)
    store.add(working, layout.INDEX)
    shutil.rmtree(working, ignore_errors=True)
    store.tidy()


def drop_index(store: Store) -> None:
    """Remove the index: what it says is about to change. Its metadata goes first."""
    store.remove(f"{layout.INDEX}/{layout.METADATA}")
    store.remove(layout.INDEX)


def read_index(store: Store, manifest: Manifest) -> Index | None:
    """The index, or None when there is none.

    Raises:
        CacheError: It is damaged or of another cache.
    """
    where = f"{store.name}/{layout.INDEX}"
    try:
        attributes = layout.read_guarded_json(store.read(f"{layout.INDEX}/{layout.METADATA}"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{where} is damaged ({error}); run `cascache finalize` to write it again"
        ) from error
    if attributes.get("identity_sha256") != layout.identity_sha256(manifest):
        raise CacheError(f"{where} belongs to another cache; run `cascache finalize` to write it again")
    try:
        return _read_arrays(store, attributes)
    except (PartCorrupt, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{where} is damaged ({error}); run `cascache finalize` to write it again"
        ) from error


def _read_arrays(store: Store, attributes: Mapping[str, Any]) -> Index:
    num_records, num_blocks = int(attributes["num_records"]), int(attributes["num_blocks"])
    directories = {int(part): str(name) for part, name, _ in attributes["parts"]}
    blocks = _read_array(store, "blocks", 3 * num_blocks).reshape(3, -1)
    text = _read_array(store, "text", int(attributes["num_text_bytes"]))
    table = _read_array(store, "samples", 3 * num_records).reshape(3, -1)
    good = all(layout.is_directory_of(name, part) for part, name in directories.items())
    good = good and set(np.unique(blocks[0]).tolist()) <= directories.keys() and bool((blocks[1:] >= 0).all())
    if not good or int(blocks[2].sum()) != num_records:
        raise ValueError("it contradicts itself")
    return Index(directories, blocks, Names(text, table))


def _read_array(store: Store, name: str, length: int) -> Array:
    reader = ShardReader(store, f"{layout.INDEX}/{name}")
    try:
        if not 0 <= length <= reader.meta.capacity:
            raise ValueError(f"{name} holds {reader.meta.capacity} values, not {length}")
        return reader.read_block(0, length)
    finally:
        reader.close()
