"""Proving a cache: every byte hashed, every block decoded, and what to do about the rest.

quick   manifest, seals, names and sizes of files
deep    + SHA-256 of every file, every block decoded, ids unique
Report  problems, and the repair plan: parts to dump again, files to remove
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from common.cache import layout
from common.cache.block import Block
from common.cache.index import INDEX_ARRAYS, decode_names, drop_index, read_index
from common.cache.part import PartReader
from common.cache.places import open_store
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.shard import SHARD_NAME
from common.cache.store import Store
from common.errors import CacheError
from schemas.manifest import FileSeal, Manifest, PartSeal

_READ_BYTES: Final = 8 << 20

Kind = Literal[
    "manifest",
    "skeleton",
    "seal",
    "identity",
    "missing",
    "extra",
    "bytes",
    "content",
    "index",
    "unsealed",
    "overlap",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: Kind
    """What sort of thing."""
    part: int | None
    """Part to dump again, where that mends it."""
    path: str
    """Where, relative to the cache."""
    message: str
    """Found and wanted."""


@dataclass(slots=True)
class Report:
    """What verify found."""

    path: str
    """The cache."""
    deep: bool
    """Whether bytes were hashed and blocks decoded."""
    num_parts: int = 0
    """Parts of the plan."""
    num_sealed: int = 0
    """Parts with a seal."""
    num_records: int = 0
    """Records sealed."""
    num_bytes: int = 0
    """Bytes of all sealed files."""
    missing_parts: list[int] = field(default_factory=list)
    """Parts not sealed yet; a dump that goes on, not a fault."""
    problems: list[Problem] = field(default_factory=list)
    """Faults, `unsealed` leftovers included."""

    @property
    def bad_parts(self) -> list[int]:
        """Sealed parts that have to be dumped again."""
        return sorted({p.part for p in self.problems if p.part is not None})

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; missing parts and leftovers of killed writers are not."""
        return all(p.kind == "unsealed" for p in self.problems)


def verify(path: str, *, deep: bool = True) -> Report:
    """Check a whole cache. Reads only.

    Args:
        path: Directory or URL of the cache.
        deep: Hash every byte and decode every block too.
    """
    store, report = open_store(path), Report(path=path, deep=deep)
    try:
        manifest = read_manifest(store)
    except CacheError as error:
        report.problems.append(Problem("manifest", None, layout.METADATA, str(error)))
        return report
    report.num_parts = manifest.num_parts
    sealed = sealed_parts(store)
    report.num_sealed = len(sealed)
    report.missing_parts = sorted(set(range(manifest.num_parts)) - sealed)
    report.problems += _check_skeleton(store)
    seals: dict[int, PartSeal] = {}
    for part in sorted(sealed):
        try:
            seals[part] = read_seal(store, part)
        except CacheError as error:
            report.problems.append(Problem("seal", part, layout.seal_key(part), str(error)))
    owners: dict[str, int] = {}
    for seal in seals.values():
        report.num_records += seal.num_records
        report.num_bytes += sum(f.size_bytes for f in seal.files.values())
        report.problems += _check_part(store, manifest, seal, deep=deep, owners=owners)
    report.problems += _check_ranges(seals, manifest)
    report.problems += _check_leftovers(store, {seal.directory for seal in seals.values()})
    report.problems += _check_index(store, manifest, seals)
    return report


def _check_skeleton(store: Store) -> Iterator[Problem]:
    for name in (layout.PARTS, layout.SEALS):
        key = f"{name}/{layout.METADATA}"
        try:
            good = store.read(key) == layout.group_json({})
        except FileNotFoundError:
            good = False
        if not good:
            yield Problem("skeleton", None, key, "is missing or damaged; `cascache repair` writes it again")


def _check_part(
    store: Store, manifest: Manifest, seal: PartSeal, *, deep: bool, owners: dict[str, int]
) -> Iterator[Problem]:
    part, base = seal.part, f"{layout.PARTS}/{seal.directory}"
    if seal.identity_sha256 != layout.identity_sha256(manifest):
        yield Problem("identity", part, base, "was sealed for another cache")
    sizes = store.walk(base)
    for name in sorted(sizes.keys() - seal.files.keys()):
        yield Problem("extra", part, f"{base}/{name}", "is not in the seal")
    clean = True
    for name, wanted in seal.files.items():
        fault = _check_file(store, f"{base}/{name}", sizes.get(name), wanted, deep=deep)
        if fault is not None:
            clean = False
            yield Problem("missing" if name not in sizes else "bytes", part, f"{base}/{name}", fault)
    if clean and deep:
        yield from _check_content(store, base, manifest, seal, owners=owners)


def _check_file(store: Store, key: str, size: int | None, wanted: FileSeal, *, deep: bool) -> str | None:
    """What is wrong with one file, if anything."""
    if size is None:
        return "is missing"
    if size != wanted.size_bytes:
        return f"has {size} bytes, its seal says {wanted.size_bytes}"
    if not deep:
        return None
    try:
        blob = store.open(key)
    except OSError as error:
        return f"cannot be read ({error})"
    digest = hashlib.sha256()
    for offset in range(0, blob.size, _READ_BYTES):
        digest.update(blob.read(offset, _READ_BYTES))
    blob.close()
    return None if digest.hexdigest() == wanted.sha256 else "its SHA-256 is not the sealed one"


def _check_content(
    store: Store, base: str, manifest: Manifest, seal: PartSeal, *, owners: dict[str, int]
) -> Iterator[Problem]:
    """Decode every block: what its checksums protect must also make sense."""
    num_records = 0
    try:
        reader = PartReader(store, base)
        try:
            for number in range(reader.num_blocks):
                columns = reader.read_columns(number)
                block = Block(columns, reader.info.codings, manifest, f"block {number} of {base}")
                num_records += len(block)
                for index, sample_id in enumerate(block.sample_ids):
                    first = owners.setdefault(sample_id, seal.part)
                    if first != seal.part:
                        yield Problem("overlap", seal.part, base, f"{sample_id!r} is in part {first} too")
                    block.record(index)
        finally:
            reader.close()
    except (CacheError, ValueError) as error:
        yield Problem("content", seal.part, base, str(error))
        return
    if num_records != seal.num_records:
        yield Problem(
            "content", seal.part, base, f"holds {num_records} records, its seal says {seal.num_records}"
        )


def _check_ranges(seals: Mapping[int, PartSeal], manifest: Manifest) -> Iterator[Problem]:
    for part, seal in seals.items():
        first = part * manifest.part_samples
        wanted = (first, max(0, min(manifest.part_samples, manifest.samples.num_samples - first)))
        if (seal.first_sample, seal.num_samples) != wanted:
            found = f"{seal.num_samples} samples from {seal.first_sample}"
            yield Problem("overlap", part, layout.seal_key(part), f"covers {found}, the plan says {wanted}")


def _check_leftovers(store: Store, directories: set[str]) -> Iterator[Problem]:
    for parent in (layout.PARTS, layout.WRITING):
        for name in store.names(parent):
            if name != layout.METADATA and not (parent == layout.PARTS and name in directories):
                yield Problem(
                    "unsealed", None, f"{parent}/{name}", "has no seal: a writer works on it, or was killed"
                )
    for name in store.names(""):
        if name not in layout.KNOWN_NAMES:
            yield Problem("extra", None, name, "is not part of a cache")
    for name in store.names(layout.SEALS):
        extra = [n for n in store.names(f"{layout.SEALS}/{name}") if n != layout.METADATA]
        if name != layout.METADATA and (extra or not name.isdecimal()):
            yield Problem("extra", None, f"{layout.SEALS}/{name}", "is not a seal")


def _check_index(store: Store, manifest: Manifest, seals: Mapping[int, PartSeal]) -> Iterator[Problem]:
    try:
        index = read_index(store, manifest)
        if index is not None:
            decode_names(index.names)
    except CacheError as error:
        yield Problem("index", None, layout.INDEX, str(error))
        return
    if index is None:
        return
    for part, directory in index.directories.items():
        if part not in seals or seals[part].directory != directory:
            found = seals[part].directory if part in seals else "no seal"
            yield Problem(
                "index", None, layout.INDEX, f"names {directory} for part {part}, which has {found}"
            )
    counts = {part: int(index.blocks[2][index.blocks[0] == part].sum()) for part in index.directories}
    for part, seal in seals.items():
        if part in counts and counts[part] != seal.num_records:
            yield Problem("index", None, layout.INDEX, f"says {counts[part]} records of part {part}: wrong")
    sizes = store.walk(layout.INDEX)
    known = {f"{spec.name}/{name}" for spec in INDEX_ARRAYS for name in (layout.METADATA, SHARD_NAME)}
    for name in sorted(sizes.keys() - known - {layout.METADATA}):
        yield Problem("index", None, f"{layout.INDEX}/{name}", "is not part of the index")


def repair(report: Report) -> list[int]:
    """Unseal what is damaged and remove leftovers, so that the same teacher-dump command fills the gaps.

    Run it only while no writer is at work.

    Args:
        report: What `verify` found.

    Returns:
        Parts that have to be dumped again, missing ones included.

    Raises:
        CacheError: The manifest itself is damaged: nothing can be trusted.
    """
    store = open_store(report.path)
    read_manifest(store)
    if any(p.kind != "unsealed" for p in report.problems):
        drop_index(store)
    for part in report.bad_parts:
        store.remove(layout.seal_key(part))
        store.remove(layout.seal_key(part).removesuffix(f"/{layout.METADATA}"))
    kept = {read_seal(store, part).directory for part in sealed_parts(store)}
    for problem in [*_check_leftovers(store, kept)]:
        if problem.kind == "unsealed":
            store.remove(problem.path)
    for problem in report.problems:
        if problem.kind == "skeleton":
            store.remove(problem.path)
            store.create(problem.path, layout.group_json({}))
    return sorted(set(report.missing_parts) | set(report.bad_parts))
