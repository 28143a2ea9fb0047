"""Proving a cache: every byte hashed, every block decoded, and what to do about the rest.

quick   manifest, seals, names and sizes of files
deep    + SHA-256 of every file, every block decoded, ids unique
Report  problems, and the repair plan: parts to dump again, files to remove
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from common.cache import layout
from common.cache.block import Block
from common.cache.hashing import file_fault
from common.cache.index import (
    decode_names,
    drop_index,
    index_directory,
    index_faults,
    is_index_directory,
    read_index,
)
from common.cache.part import PartReader
from common.cache.places import open_store
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.store import Store
from common.errors import CacheError
from schemas.manifest import Manifest, PartSeal

_LINK_TEXT: Final = "is a symbolic link; a cache holds none, and what it points to is not touched"

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
    "link",
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
    def odd_parts(self) -> list[int]:
        """Bad parts whose files are as they were sealed: made by another version, or a faulty writer."""
        damaged = {p.part for p in self.problems if p.kind != "content"}
        return [part for part in self.bad_parts if part not in damaged]

    @property
    def complete(self) -> bool:
        """Whether every part of the plan is sealed."""
        return self.num_parts > 0 and not self.missing_parts

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; missing parts and leftovers of killed writers are not."""
        return all(p.kind == "unsealed" for p in self.problems)


def verify(path: str, *, deep: bool = True) -> Report:
    """Check a whole cache: what lies in the store itself, never a local copy of it. Reads only.

    Args:
        path: Directory or URL of the cache.
        deep: Hash every byte and decode every block too.
    """
    store, report = open_store(path, copied=False), Report(path=path, deep=deep)
    try:
        manifest = read_manifest(store)
    except CacheError as error:
        report.problems.append(Problem("manifest", None, layout.METADATA, str(error)))
        return report
    report.num_parts = manifest.num_parts
    links = store.links()
    if blocking := [link for link in links if _blocks(link)]:
        report.problems += [Problem("link", None, link, _LINK_TEXT) for link in blocking]
        return report
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
    report.problems += _check_links(links, seals)
    report.problems += _check_ranges(seals, manifest)
    report.problems += _check_leftovers(store, {seal.directory for seal in seals.values()})
    report.problems += _check_index(store, manifest, seals)
    return report


def _blocks(link: str) -> bool:
    """Whether a link stands where nothing behind it may be read or removed."""
    return link in layout.KNOWN_NAMES or link.startswith(f"{layout.SEALS}/")


def _check_links(links: Sequence[str], seals: Mapping[int, PartSeal]) -> Iterator[Problem]:
    owners = {f"{layout.PARTS}/{seal.directory}": part for part, seal in seals.items()}
    for link in links:
        part = owners.get("/".join(link.split("/")[:2]))
        yield Problem("link", part, link, _LINK_TEXT)


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
    try:
        sizes = store.walk(base)
    except CacheError as error:
        yield Problem("missing", part, base, str(error))
        return
    for name in sorted(sizes.keys() - seal.files.keys()):
        yield Problem("extra", part, f"{base}/{name}", "is not in the seal")
    clean = True
    for name, wanted in seal.files.items():
        fault = file_fault(store, f"{base}/{name}", sizes.get(name), wanted, deep=deep)
        if fault is not None:
            clean = False
            yield Problem("missing" if name not in sizes else "bytes", part, f"{base}/{name}", fault)
    if clean and deep:
        yield from _check_content(store, base, manifest, seal, owners=owners)


def _check_content(
    store: Store, base: str, manifest: Manifest, seal: PartSeal, *, owners: dict[str, int]
) -> Iterator[Problem]:
    """Decode every block: what its checksums protect must also make sense."""
    counts = Counter[str]()
    try:
        reader = PartReader(store, base)
        try:
            for number in range(reader.num_blocks):
                columns = reader.read_columns(number)
                block = Block(columns, reader.info.codings, manifest, f"block {number} of {base}")
                counts.update(block.counts())
                for index, sample_id in enumerate(block.sample_ids):
                    if sample_id in owners:
                        where = f"{sample_id!r} is in part {owners[sample_id]} too"
                        yield Problem("overlap", seal.part, base, where)
                    owners[sample_id] = seal.part
                    block.record(index)
        finally:
            reader.close()
    except (CacheError, ValueError) as error:
        yield Problem("content", seal.part, base, str(error))
        return
    for name in ("num_records", "num_images", "num_response_rows", "num_visual_rows"):
        if (found := counts[name]) != (wanted := getattr(seal, name)):
            what = name.removeprefix("num_").replace("_", " ")
            yield Problem("content", seal.part, base, f"holds {found} {what}, its seal says {wanted}")


def _check_ranges(seals: Mapping[int, PartSeal], manifest: Manifest) -> Iterator[Problem]:
    for part, seal in seals.items():
        first = part * manifest.part_samples
        wanted = (first, max(0, min(manifest.part_samples, manifest.samples.num_samples - first)))
        if (seal.first_sample, seal.num_samples) != wanted:
            found = f"{seal.num_samples} samples from {seal.first_sample}"
            yield Problem("overlap", part, layout.seal_key(part), f"covers {found}, the plan says {wanted}")
        if seal.num_records + len(seal.quarantined) != seal.num_samples:
            found = f"{seal.num_records} records and {len(seal.quarantined)} quarantined"
            wanted_text = f"are not its {seal.num_samples} samples: some are lost"
            yield Problem("content", part, layout.seal_key(part), f"{found} {wanted_text}")


def _check_leftovers(store: Store, directories: set[str]) -> Iterator[Problem]:
    for parent in (layout.PARTS, layout.WRITING):
        for name in store.names(parent):
            if name != layout.METADATA and not (parent == layout.PARTS and name in directories):
                yield Problem(
                    "unsealed", None, f"{parent}/{name}", "has no seal: a writer works on it, or was killed"
                )
    current = index_directory(store)
    for name in sorted(set(store.names(layout.INDEX)) - {layout.METADATA, current}):
        if is_index_directory(name):
            yield Problem("unsealed", None, f"{layout.INDEX}/{name}", "is an index that is not in use")
        else:
            yield Problem("extra", None, f"{layout.INDEX}/{name}", "is not part of the index")
    for name in store.names(""):
        if name not in layout.KNOWN_NAMES:
            yield Problem("extra", None, name, "is not part of a cache")
    for name in store.names(layout.SEALS):
        extra = [n for n in store.names(f"{layout.SEALS}/{name}") if n != layout.METADATA]
        if name != layout.METADATA and (extra or not layout.is_seal_name(name)):
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
    yield from _check_index_files(store)


def _check_index_files(store: Store) -> Iterator[Problem]:
    attributes = layout.read_guarded_json(store.read(f"{layout.INDEX}/{layout.METADATA}"))
    for path, fault in index_faults(store, attributes).items():
        yield Problem("index", None, path, fault)


def repair(report: Report, *, odd_too: bool = False) -> list[int]:
    """Unseal what is damaged and remove leftovers, so that the same teacher-dump command fills the gaps.

    Run it only while no writer is at work.

    Args:
        report: What `verify` found.
        odd_too: Whether to unseal `Report.odd_parts` as well: nothing has happened to their files.

    Returns:
        Parts that have to be dumped again, missing ones included.

    Raises:
        CacheError: The manifest itself is damaged, or a symbolic link stands in the way: nothing is changed.
    """
    store = open_store(report.path, copied=False)
    read_manifest(store)
    if blocking := [
        problem for problem in report.problems if problem.kind == "link" and _blocks(problem.path)
    ]:
        raise CacheError(
            f"{report.path}/{blocking[0].path} {_LINK_TEXT}; put what it points to in its place, or remove "
            f"the link, then repair again"
        )
    if any(p.kind != "unsealed" for p in report.problems):
        drop_index(store)
    doomed = [part for part in report.bad_parts if odd_too or part not in report.odd_parts]
    for part in doomed:
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
    return sorted(set(report.missing_parts) | set(doomed))
