"""Ways to break a cache, as data: what is changed, where, and whether every hash is made to fit again.

    bytes    a file's bytes: flipped, cut, grown                    nobody's hashes fit
    json     a value of a document: replaced, removed, doubled      its own hash fits
    values   numbers of an array, decoded, changed, encoded again   checksums fit
    chunk    bytes of a compressed chunk, so that the decoder sees them
    shard    the index of a shard
    file     a link, a directory or a pipe where a file was

`sealed`: the attacker also recomputes seals, identities and the index, so that only the decoders stand
between the mutation and a reader.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import ValidationError

from common.cache import layout
from common.cache.hashing import hash_files
from common.cache.shard import SHARD_NAME, Coding, ShardReader, chunk_checks, crc32c, encode_shard
from common.cache.store import LocalStore
from schemas.manifest import Manifest

Kind = Literal["bytes", "json", "values", "chunk", "shard", "file"]
Path_ = tuple[str | int, ...]

REMOVE: Final = "remove!"
"""As a value: the key or entry goes."""

DOUBLE: Final = "double!"
"""As a value: the key occurs twice, the second time with null."""

DEEP: Final = "deep!"
"""As a value: lists in lists, 3000 deep."""

HOSTILE: Final[tuple[Any, ...]] = (
    *(None, True, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "0", "../..", "/etc/passwd", "x" * 2000, "\ud800", "\u0663", "float64"),
    *([], {}, [[]], [0], [-1], [1] * 5000, {"a": 1}, REMOVE, DOUBLE, DEEP),
)
"""What a hostile author puts in place of a value."""

_TOO_DEEP: Final = 3000
_INDEX_ENTRY_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change to one file."""

    kind: Kind
    """Which sort."""
    target: str
    """The file; `{part}` and `{index}` stand for their directories' random names."""
    at: Path_ = ()
    """Where: the path to a JSON value, or an offset and what to do there."""
    value: Any = None
    """What is put there."""
    sealed: bool = False
    """Whether all hashes are made to fit again."""


def places(root: Path) -> dict[str, str]:
    """What `{part}` and `{index}` stand for."""
    return {"part": _directory(root, "seals/00000"), "index": _directory(root, "index")}


def _directory(root: Path, group: str) -> str:
    document = json.loads((root / group / layout.METADATA).read_text("utf-8"))
    return f"{'index' if group == 'index' else 'parts'}/{document['attributes']['directory']}"


def mutate(root: Path, mutation: Mutation) -> None:
    """Carry a mutation out on the cache at `root`."""
    names = places(root)
    path = root / mutation.target.format(**names)
    changes: dict[Kind, Callable[[Path, Mutation], None]] = {
        "bytes": _mutate_bytes,
        "json": _mutate_json,
        "values": _mutate_values,
        "chunk": _mutate_chunk,
        "shard": _mutate_shard,
        "file": _mutate_file,
    }
    changes[mutation.kind](path, mutation)
    if mutation.sealed:
        if mutation.kind in ("values", "chunk", "shard"):
            _recheck(root / names["part"])
        reseal(root, names)


def reseal(root: Path, names: dict[str, str]) -> None:
    """Make seals, identities and the index fit what lies there, as a hostile author would."""
    with suppress(
        ValueError, LookupError, TypeError, AttributeError, ValidationError, RecursionError, OSError
    ):
        manifest = Manifest.model_validate(_attributes(root / layout.METADATA))
        identity = layout.identity_sha256(manifest)
        for seal in (path for path in root.glob("seals/*/zarr.json") if path.is_file()):
            _update(seal, {"identity_sha256": identity})
        _update(root / "index" / layout.METADATA, {"identity_sha256": identity})
    for document, directory in (("seals/00000", names["part"]), ("index", names["index"])):
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
            files = {name: file.model_dump() for name, file in hash_files(root / directory).items()}
            _update(root / document / layout.METADATA, {"files": files})


def _recheck(part: Path) -> None:
    """Make the part's attributes name the checksums that its chunks have now, array by array."""
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
        arrays = _attributes(part / layout.METADATA)["arrays"]
        for name, used in arrays.items():
            with suppress(ValueError, LookupError, TypeError, AttributeError, OSError, MemoryError):
                data = (part / name / SHARD_NAME).read_bytes()
                used["chunks"] = chunk_checks(data, len(used["lengths"]))
        _update(part / layout.METADATA, {"arrays": arrays})


def _attributes(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"{path} is no file")
    attributes: dict[str, Any] = json.loads(path.read_text("utf-8"))["attributes"]
    attributes.pop(layout.GUARD, None)
    return attributes


def _update(path: Path, changes: dict[str, object]) -> None:
    path.write_bytes(layout.guarded_json(_attributes(path) | changes))


def _mutate_bytes(path: Path, mutation: Mutation) -> None:
    """`at` = (what, where as a share of the file)."""
    what, share = str(mutation.at[0]), int(mutation.at[1])
    data = bytearray(path.read_bytes())
    at = share % max(1, len(data))
    if what == "flip" and data:
        data[at] ^= 1 << int(mutation.value) % 8
    elif what == "cut":
        del data[at:]
    elif what == "grow":
        data[at:at] = bytes(int(mutation.value))
    elif what == "put":
        data[at : at + 4] = int(mutation.value).to_bytes(4, "little")
    path.write_bytes(data)


def json_places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path to every value of a document."""
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from json_places(inner, (*path, key))


def _mutate_json(path: Path, mutation: Mutation) -> None:
    """Replace the value at the path `at`; the document's own hash is made to fit."""
    document = json.loads(path.read_text("utf-8"))
    guarded = layout.GUARD in document.get("attributes", {})
    document.get("attributes", {}).pop(layout.GUARD, None)
    parent, key, value = document, mutation.at[-1], mutation.value
    for step in mutation.at[:-1]:
        parent = parent[step]
    if value == REMOVE:
        del parent[key]
    elif value not in (DOUBLE, DEEP):
        parent[key] = value
    text = json.dumps(document, indent=1)
    with suppress(AttributeError, TypeError):
        if guarded:
            text = layout.guarded_json(document["attributes"]).decode()
    if value == DOUBLE:
        text = text.replace(f'"{key}":', f'"{key}": null, "{key}":', 1)
    if value == DEEP:
        text = text.replace(f'"{key}":', f'"{key}": {"[" * _TOO_DEEP}{"]" * _TOO_DEEP}, "{key}":', 1)
    path.write_text(text, "utf-8")


def _mutate_values(path: Path, mutation: Mutation) -> None:
    """Set number `at` = (block, index) of the array in directory `path`."""
    arrays = path.parent / layout.METADATA
    reader = ShardReader(LocalStore(path.parent), path.name)
    capacity = reader.meta.capacity
    pieces = [
        reader.read_block(b, capacity if reader.meta.coding == "blosc" else _used(arrays, path.name, b))
        for b in range(reader.meta.num_blocks)
    ]
    reader.close()
    piece = pieces[int(mutation.at[0]) % len(pieces)]
    if piece.size:
        _set(piece, str(mutation.at[1]), int(mutation.at[2]) % piece.size, mutation.value)
    coding = Coding(reader.meta.coding, 5)
    pad = capacity - max(p.size for p in pieces)
    if pad > 0:
        pieces[0] = np.concatenate([pieces[0], np.zeros(capacity - pieces[0].size, pieces[0].dtype)])
    data, _ = encode_shard(pieces, [max(1, p.size) for p in pieces], coding)
    (path / SHARD_NAME).write_bytes(data)


def _used(document: Path, name: str, block: int) -> int:
    used = _attributes(document)["arrays"][name]
    return int(used["lengths"][block]) * int(used.get("ranks", 1))


def _set(piece: "np.ndarray[Any, Any]", what: str, at: int, value: float) -> None:
    if what == "fill":
        piece[:] = _fit(value, piece.dtype)
    elif what == "reverse":
        piece[:] = piece[::-1].copy()
    elif what == "add":
        piece[at] = _fit(float(piece[at]) + value, piece.dtype)
    else:
        piece[at] = _fit(value, piece.dtype)


def _fit(value: float, dtype: "np.dtype[Any]") -> Any:
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    bounds = np.iinfo(dtype)
    return dtype.type(min(max(int(value) if np.isfinite(value) else 0, int(bounds.min)), int(bounds.max)))


def _mutate_chunk(path: Path, mutation: Mutation) -> None:
    """Overwrite bytes of a compressed chunk, `at` = (block, offset), and mend its checksum."""
    data, index = _split(path)
    offset, size = index[int(mutation.at[0]) % len(index)].tolist()
    body = size - 4
    new, at = int(mutation.value).to_bytes(8, "little"), int(mutation.at[1]) % max(1, body)
    width = min(1 + int(mutation.at[2]) % 8, body - at)
    data[offset + at : offset + at + width] = new[:width]
    data[offset + body : offset + size] = crc32c(bytes(data[offset : offset + body])).to_bytes(4, "little")
    _join(path, data, index)


def _mutate_shard(path: Path, mutation: Mutation) -> None:
    """Set a number of the shard's index, `at` = (number,), and mend its checksum."""
    data, index = _split(path)
    index.flat[int(mutation.at[0]) % index.size] = int(mutation.value) % 2**64
    _join(path, data, index)


def _split(path: Path) -> tuple[bytearray, "np.ndarray[Any, np.dtype[np.uint64]]"]:
    blocks = json.loads((path.parent / layout.METADATA).read_text("utf-8"))["shape"][0]
    data = bytearray(path.read_bytes())
    tail = blocks * _INDEX_ENTRY_BYTES + 4
    index = np.frombuffer(bytes(data[-tail:-4]), "<u8").reshape(-1, 2).copy()
    del data[-tail:]
    return data, index


def _join(path: Path, data: bytearray, index: "np.ndarray[Any, np.dtype[np.uint64]]") -> None:
    table = index.tobytes()
    path.write_bytes(bytes(data) + table + crc32c(table).to_bytes(4, "little"))


def _mutate_file(path: Path, mutation: Mutation) -> None:
    """Put something else in the file's place."""
    moved = path.with_name(f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
    if mutation.value == "remove":
        path.unlink()
        return
    path.rename(moved)
    if mutation.value == "link":
        path.symlink_to(moved.name)
    elif mutation.value == "link out":
        path.symlink_to("/etc/passwd")
    elif mutation.value == "directory":
        path.mkdir()
    elif mutation.value == "pipe":
        os.mkfifo(path)
    elif mutation.value == "parent link":
        parent, aside = path.parent, path.parent.with_name(f"{path.parent.name}-aside")
        moved.rename(path)
        parent.rename(aside)
        parent.symlink_to(aside.name)
    if mutation.value != "parent link":
        moved.unlink()


def draw(rng: np.random.Generator, root: Path) -> Mutation:
    """A mutation at random; the same generator state and cache shape give the same one."""
    names = places(root)
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    files = [
        f for f in files if f.startswith((*names.values(), "seals/", "index/zarr")) or f == layout.METADATA
    ]
    generic = {value: key for key, value in names.items()}
    kind: Kind = rng.choice(
        ["bytes", "json", "json", "values", "values", "values", "chunk", "chunk", "shard", "file"]
    )
    wanted = {"json": ("zarr.json",), "bytes": ("",), "file": ("",)}.get(kind, (SHARD_NAME,))
    chosen = str(rng.choice([f for f in files if f.endswith(wanted)]))
    target = chosen
    for prefix, name in generic.items():
        target = target.replace(prefix, f"{{{name}}}")
    sealed = bool(rng.random() < 0.6)
    number, other = int(rng.integers(2**40)), int(rng.integers(2**63))
    if kind == "json":
        if rng.random() < 0.5:
            target = str(
                rng.choice(["zarr.json", "seals/00000/zarr.json", "index/zarr.json", "{part}/zarr.json"])
            )
            chosen = target.format(**names)
        paths = list(json_places(json.loads((root / chosen).read_text("utf-8"))))
        at = paths[int(rng.integers(len(paths)))]
        return Mutation("json", target, at, HOSTILE[int(rng.integers(len(HOSTILE)))], sealed)
    if kind == "bytes":
        what = str(rng.choice(["flip", "flip", "cut", "grow", "put"]))
        return Mutation("bytes", target, (what, number), other % (1 << 16), sealed)
    if kind == "values":
        target = target.rsplit("/", 1)[0]
        what = str(rng.choice(["set", "set", "set", "add", "fill", "reverse"]))
        value = float(
            rng.choice(
                [-1, 0, 1, 2, 3, 8, 9, 255, 499, 500, 65535, 2**31 - 1, -(2**31), 2**32, np.nan, np.inf]
            )
        )
        return Mutation("values", target, (number % 7, what, number), value, True)
    if kind == "chunk":
        return Mutation("chunk", target, (number % 7, number, other % 8), other, True)
    if kind == "shard":
        return Mutation("shard", target, (number,), int(rng.choice([0, 1, 100, other, 2**64 - 1])), sealed)
    odd = str(rng.choice(["remove", "link", "link out", "directory", "pipe", "parent link"]))
    return Mutation("file", target, (), odd, sealed)


def restore(pristine: Path, root: Path, last: Mutation | None) -> None:
    """Make `root` a copy of `pristine` again.

    Args:
        pristine: What it was copied from.
        root: The copy.
        last: What was done to it since; None copies everything anew.
    """
    if last is None or last.kind == "file":
        aside = root.with_name(f"{root.name}-aside")
        if root.is_symlink():
            root.unlink()
        for directory in (root, aside):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(pristine, root)
        return
    touched = [
        layout.METADATA,
        f"index/{layout.METADATA}",
        *(f"seals/{n:05d}/{layout.METADATA}" for n in (0, 1)),
    ]
    target = last.target.format(**places(pristine))
    touched.append(f"{target}/{SHARD_NAME}" if last.kind == "values" else target)
    for name in touched:
        shutil.copyfile(pristine / name, root / name)
