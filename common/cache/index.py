"""The index: what opening a cache needs, in a bounded number of files.

    index/zarr.json                attributes: parts [part, directory, records], directory, files, checksum
    index/00000-9f31c2/            what it names, never changed: a new index gets a new directory
        blocks/                    [1, 3, B] part, block within the part, records
        text/                      [1, bytes] sample ids and kinds, one after the other
        samples/                   [1, 3, S] bytes of each id, of each kind (−1: none), tokens

It repeats what the parts hold; deleting it loses nothing. Parts sealed after it was written are read
from their own tables.
"""

import errno
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.hashing import file_fault, hash_files
from common.cache.part import write_shard
from common.cache.shard import SHARD_NAME, ShardReader, coding_for
from common.cache.store import Store, make_working, scratch_directory, sync_directory, write_synced
from common.errors import CacheError, PartCorrupt
from schemas.arrays import ArraySpec
from schemas.manifest import FileSeal, Manifest

log = logging.getLogger(__name__)

Array = NDArray[Any]

INDEX_ARRAYS = (
    ArraySpec("blocks", ("int32",), ("column", "B"), "small"),
    ArraySpec("text", ("uint8",), ("byte",), "small"),
    ArraySpec("samples", ("int32",), ("column", "S"), "small"),
)
INDEX_FILES: Final = frozenset(
    f"{spec.name}/{name}" for spec in INDEX_ARRAYS for name in (layout.METADATA, SHARD_NAME)
) | {layout.METADATA}
"""Every file of an index, relative to its directory."""

READ_ATTEMPTS: Final = 8
"""How many times an index that another process is replacing is read again."""

_CURE: Final = "run `cascache finalize` to write it again"
_POINTER: Final = f"{layout.INDEX}/{layout.METADATA}"


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
    """Write the index of all sealed parts; replaces an older one, unless that is the same and whole.

    It goes to a directory of its own, which `index/zarr.json` then names: of several writers one creates that
    file, the others remove what they wrote.
    """
    name = layout.new_directory(0)
    working = _working(store, name)
    try:
        attributes = _write_arrays(working, index, layout.identity_sha256(manifest))
        before = _pointer(store)
        if before is not None and _says(before, attributes) and not index_faults(store, before):
            return
        store.add(working, f"{layout.INDEX}/{name}")
        if before is not None:
            store.remove(_POINTER)
        if not store.create(_POINTER, layout.guarded_json(attributes | {"directory": name})):
            store.remove(f"{layout.INDEX}/{name}")
            log.info("the index of %s was written by another process meanwhile", store.name)
        elif before is not None and is_index_directory(before.get("directory")):
            store.remove(f"{layout.INDEX}/{before['directory']}")
    finally:
        shutil.rmtree(working, ignore_errors=True)
        store.tidy()


def _working(store: Store, name: str) -> Path:
    """Where to prepare an index; elsewhere, if the cache is read-only and may have an index already."""
    try:
        return make_working(store, name)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return scratch_directory()


def _write_arrays(working: Path, index: Index, identity: str) -> dict[str, object]:
    """Write the arrays into an empty directory; returns the attributes that describe them."""
    arrays: dict[str, Array] = {
        "blocks": index.blocks,
        "text": index.names.text,
        "samples": index.names.table,
    }
    for spec in INDEX_ARRAYS:
        flat = arrays[spec.name].reshape(-1)
        write_shard(working / spec.name, [flat], [1], coding_for("portable", flat.dtype, spec.packing))
    write_synced(working / layout.METADATA, layout.group_json({}))
    sync_directory(working)
    counts = np.zeros(1 + max(index.directories, default=0), np.int64)
    np.add.at(counts, index.blocks[0], index.blocks[2])
    return {
        "identity_sha256": identity,
        "num_blocks": index.blocks.shape[1],
        "num_text_bytes": len(index.names.text),
        "num_records": index.names.table.shape[1],
        "parts": [[part, name, int(counts[part])] for part, name in sorted(index.directories.items())],
        "files": {name: seal.model_dump() for name, seal in hash_files(working).items()},
    }


def _pointer(store: Store) -> dict[str, Any] | None:
    """Attributes of the index there is; an empty one for a damaged file, which has to go too."""
    try:
        return _read_pointer(store)
    except CacheError:
        return {}


def _read_pointer(store: Store) -> dict[str, Any] | None:
    """Attributes of the index, or None when there is none.

    Raises:
        CacheError: They are damaged.
    """
    try:
        return layout.read_guarded_json(store.read(_POINTER))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"{store.name}/{_POINTER} is damaged ({error}); {_CURE}") from error


def _says(found: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    return {name: value for name, value in found.items() if name != "directory"} == wanted


def is_index_directory(name: object) -> bool:
    """Whether this is the name of a directory that an index may lie in."""
    return isinstance(name, str) and layout.is_directory_of(name, 0)


def index_directory(store: Store) -> str | None:
    """Name of the directory that the index is in, if there is one."""
    name = (_pointer(store) or {}).get("directory")
    return str(name) if is_index_directory(name) else None


def index_faults(store: Store, attributes: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each file of the index that these attributes describe, every byte hashed."""
    base = f"{layout.INDEX}/{attributes.get('directory')}"
    try:
        files = {str(name): FileSeal.model_validate(seal) for name, seal in dict(attributes["files"]).items()}
        if not is_index_directory(attributes.get("directory")) or files.keys() != INDEX_FILES:
            raise ValueError("it names other files than an index has")
        sizes = store.walk(base)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {layout.INDEX: f"is damaged ({error}); {_CURE}"}
    faults = {f"{base}/{name}": "is not part of the index" for name in sizes.keys() - files.keys()}
    for name, seal in files.items():
        fault = file_fault(store, f"{base}/{name}", sizes.get(name), seal, deep=True)
        if fault is not None:
            faults[f"{base}/{name}"] = f"{fault}; run `cascache finalize` to write the index again"
    return faults


def drop_index(store: Store) -> None:
    """Remove the index: what it says is about to change. The file that makes it exist goes first."""
    store.remove(_POINTER)
    store.remove(layout.INDEX)


def read_index(store: Store, manifest: Manifest) -> Index | None:
    """The index, or None when there is none.

    Raises:
        CacheError: It is damaged or of another cache.
    """
    for left in reversed(range(READ_ATTEMPTS)):
        attributes = _read_pointer(store)
        if attributes is None:
            return None
        try:
            return _read_described(store, manifest, attributes)
        except CacheError:
            if not left or _pointer(store) == attributes:  # else it was replaced while it was read
                raise
    return None


def _read_described(store: Store, manifest: Manifest, attributes: Mapping[str, Any]) -> Index:
    where = f"{store.name}/{layout.INDEX}"
    if attributes.get("identity_sha256") != layout.identity_sha256(manifest):
        raise CacheError(f"{where} belongs to another cache; {_CURE}")
    try:
        if not is_index_directory(attributes["directory"]):
            raise ValueError("it names no directory of an index")
        return _read_arrays(store, attributes)
    except (PartCorrupt, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CacheError(f"{where} is damaged ({error}); {_CURE}") from error


def _read_arrays(store: Store, attributes: Mapping[str, Any]) -> Index:
    base = f"{layout.INDEX}/{attributes['directory']}"
    num_records, num_blocks = int(attributes["num_records"]), int(attributes["num_blocks"])
    directories = {int(part): str(name) for part, name, _ in attributes["parts"]}
    blocks = _read_array(store, f"{base}/blocks", 3 * num_blocks).reshape(3, -1)
    text = _read_array(store, f"{base}/text", int(attributes["num_text_bytes"]))
    table = _read_array(store, f"{base}/samples", 3 * num_records).reshape(3, -1)
    good = all(layout.is_directory_of(name, part) for part, name in directories.items())
    good = good and np.unique(blocks[:2], axis=1).shape == (2, num_blocks)
    good = good and set(np.unique(blocks[0]).tolist()) <= directories.keys() and bool((blocks[1:] >= 0).all())
    if not good or int(blocks[2].sum()) != num_records:
        raise ValueError("it contradicts itself")
    return Index(directories, blocks, Names(text, table))


def _read_array(store: Store, key: str, length: int) -> Array:
    reader = ShardReader(store, key)
    try:
        if not 0 <= length <= reader.meta.capacity:
            raise ValueError(f"{key} holds {reader.meta.capacity} values, not {length}")
        return reader.read_block(0, length)
    finally:
        reader.close()
