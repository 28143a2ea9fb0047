"""Proving a cache: every byte hashed, every block decoded, and what to do about the rest.

quick   manifest, seals, names and sizes of files
deep    + SHA-256 of every file, every block decoded, ids unique
Report  problems, and the repair plan: parts to dump again, files to remove
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.cache import layout
from common.cache.block import Block
from common.cache.index import drop_index, read_index
from common.cache.part import PartReader
from common.cache.writer import hash_file, read_manifest, read_seal, sealed_parts
from common.errors import CacheError, PartMissing
from schemas.manifest import Manifest, PartSeal

Kind = Literal[
    "manifest", "seal", "identity", "missing", "extra", "bytes", "content", "index", "unsealed", "overlap"
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
        path: Directory of the cache.
        deep: Hash every byte and decode every block too.
    """
    root = Path(path)
    report = Report(path=path, deep=deep)
    try:
        manifest = read_manifest(root)
    except CacheError as error:
        report.problems.append(Problem("manifest", None, layout.METADATA, str(error)))
        return report
    report.num_parts = manifest.num_parts
    sealed = sealed_parts(root)
    report.num_sealed = len(sealed)
    report.missing_parts = sorted(set(range(manifest.num_parts)) - sealed)
    report.problems += _check_skeleton(root)
    directories, owners, ranges = set(), dict[str, int](), dict[int, tuple[int, int]]()
    for part in sorted(sealed):
        try:
            seal = read_seal(root, part)
        except CacheError as error:
            report.problems.append(
                Problem("seal", part, f"{layout.SEALS}/{layout.part_name(part)}", str(error))
            )
            continue
        directories.add(seal.directory)
        report.num_records += seal.num_records
        report.num_bytes += sum(f.size_bytes for f in seal.files.values())
        ranges[part] = (seal.first_sample, seal.first_sample + seal.num_samples)
        report.problems += _check_part(root, manifest, seal, deep=deep, owners=owners)
    report.problems += _check_ranges(ranges, manifest)
    report.problems += _check_leftovers(root, directories)
    report.problems += _check_index(root, manifest)
    return report


def _check_skeleton(root: Path) -> Iterator[Problem]:
    for name in (layout.PARTS, layout.SEALS):
        path = root / name / layout.METADATA
        if not path.is_file() or path.read_bytes() != layout.group_json({}):
            yield Problem(
                "manifest",
                None,
                f"{name}/{layout.METADATA}",
                "is missing or damaged; `cascache repair` writes it again",
            )


def _check_part(
    root: Path, manifest: Manifest, seal: PartSeal, *, deep: bool, owners: dict[str, int]
) -> Iterator[Problem]:
    part, base = seal.part, f"{layout.PARTS}/{seal.directory}"
    directory = root / layout.PARTS / seal.directory
    if seal.identity_sha256 != layout.identity_sha256(manifest):
        yield Problem("identity", part, base, "was sealed for another cache")
    if not directory.is_dir():
        yield Problem("missing", part, base, "the directory is missing")
        return
    present = {
        str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir() or p.is_symlink()
    }
    for name in sorted(present - seal.files.keys()):
        yield Problem("extra", part, f"{base}/{name}", "is not in the seal")
    clean = True
    for name, wanted in seal.files.items():
        if name not in present:
            yield Problem("missing", part, f"{base}/{name}", "is missing")
            clean = False
            continue
        size = (directory / name).stat().st_size
        if size != wanted.size_bytes:
            yield Problem(
                "bytes", part, f"{base}/{name}", f"has {size} bytes, its seal says {wanted.size_bytes}"
            )
            clean = False
        elif deep and hash_file(directory / name) != wanted:
            yield Problem("bytes", part, f"{base}/{name}", "its SHA-256 is not the sealed one")
            clean = False
    if clean and deep:
        yield from _check_content(directory, manifest, seal, owners=owners)


def _check_content(
    directory: Path, manifest: Manifest, seal: PartSeal, *, owners: dict[str, int]
) -> Iterator[Problem]:
    """Decode every block: what its checksums protect must also make sense."""
    where = f"{layout.PARTS}/{seal.directory}"
    num_records = 0
    try:
        reader = PartReader(directory)
        try:
            for number in range(reader.num_blocks):
                block = Block(
                    reader.read_columns(number), reader.info.codings, manifest, f"block {number} of {where}"
                )
                num_records += len(block)
                for sample_id in block.sample_ids:
                    first = owners.setdefault(sample_id, seal.part)
                    if first != seal.part:
                        yield Problem(
                            "overlap", seal.part, where, f"sample {sample_id!r} is in part {first} too"
                        )
                for index in range(len(block)):
                    block.record(index)
        finally:
            reader.close()
    except (CacheError, ValueError) as error:
        yield Problem("content", seal.part, where, str(error))
        return
    if num_records != seal.num_records:
        yield Problem(
            "content", seal.part, where, f"holds {num_records} records, its seal says {seal.num_records}"
        )


def _check_ranges(ranges: dict[int, tuple[int, int]], manifest: Manifest) -> Iterator[Problem]:
    for part, found in sorted(ranges.items()):
        first = part * manifest.part_samples
        wanted = (first, min(first + manifest.part_samples, manifest.samples.num_samples))
        if found != wanted:
            yield Problem(
                "overlap", part, layout.part_name(part), f"covers samples {found}, the plan says {wanted}"
            )


def _check_leftovers(root: Path, directories: set[str]) -> Iterator[Problem]:
    for parent in (layout.PARTS, layout.WRITING):
        if not (root / parent).is_dir():
            continue
        for entry in sorted((root / parent).iterdir()):
            if entry.name == layout.METADATA or (parent == layout.PARTS and entry.name in directories):
                continue
            yield Problem(
                "unsealed",
                None,
                f"{parent}/{entry.name}",
                "belongs to no seal: a writer is at work, or was killed",
            )
    known = {layout.METADATA, layout.PARTS, layout.SEALS, layout.INDEX, layout.WRITING}
    for entry in sorted(root.iterdir()):
        if entry.name not in known:
            yield Problem("extra", None, entry.name, "is not part of a cache")


def _check_index(root: Path, manifest: Manifest) -> Iterator[Problem]:
    try:
        index = read_index(root, manifest)
    except CacheError as error:
        yield Problem("index", None, layout.INDEX, str(error))
        return
    for part, directory in (index.directories if index else {}).items():
        try:
            sealed = read_seal(root, part).directory
        except PartMissing:
            sealed = "nothing"
        except CacheError:
            continue
        if sealed != directory:
            yield Problem(
                "index", None, layout.INDEX, f"names {directory} for part {part}, which is sealed in {sealed}"
            )


def repair(report: Report) -> list[int]:
    """Unseal what is damaged and remove leftovers, so that the same teacher-dump command fills the gaps.

    Run it only while no writer is at work.

    Args:
        report: What `verify` found.

    Returns:
        Parts that have to be dumped again, missing ones included.
    """
    root = Path(report.path)
    if report.problems:
        drop_index(root)
    for part in report.bad_parts:
        shutil.rmtree(layout.seal_path(root, part).parent, ignore_errors=True)
    kept = set()
    for part in sealed_parts(root):
        kept.add(read_seal(root, part).directory)
    for problem in _check_leftovers(root, kept):
        if problem.kind == "unsealed":
            shutil.rmtree(root / problem.path, ignore_errors=True)
    for name in (layout.PARTS, layout.SEALS):
        path = root / name / layout.METADATA
        if any(p.path == f"{name}/{layout.METADATA}" for p in report.problems):
            path.unlink(missing_ok=True)
            path.write_bytes(layout.group_json({}))
    return sorted(set(report.missing_parts) | set(report.bad_parts))
