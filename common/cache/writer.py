"""Writing a cache: whole parts, each final at once or not there at all.

    records ─ group into blocks ─ encode ─> .writing/00012-9f31c2 ─ fsync ─ rename ─> parts/00012-9f31c2
                                                                      └─ link ─> seals/00012/zarr.json

Killed anywhere before the link, a part does not exist and is dumped again. Two writers of one part each
have a directory of their own; `link` lets one of them create the seal, the other removes its directory.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from pydantic import ValidationError

from common.cache import layout
from common.cache.pack import pack_part, unique_images
from common.cache.part import sync_directory, write_part_files, write_synced
from common.errors import CacheError, DataError, MismatchError, PartMissing
from common.record import Record
from schemas.manifest import FileSeal, Manifest, PartSeal, Quarantined

log = logging.getLogger(__name__)

BLOCK_ROWS: Final = 16_384
"""Rows a block aims at: enough to decode at full speed, few enough to shuffle in memory."""

MAX_BLOCK_SAMPLES: Final = 4_096
"""Samples a block holds at most, when they have few rows."""


def read_manifest(root: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        CacheError: There is no cache, or its manifest is not of this format.
    """
    path = root / layout.METADATA
    try:
        attributes = layout.read_guarded_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(
            f"{root} is not a cache: {path} is missing; check the path, or dump one with teacher-dump"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}); restore it from another copy of the cache") from error
    try:
        return Manifest.model_validate(attributes)
    except ValidationError as error:
        raise CacheError(
            f"{path} is not a cascache manifest of format 1: {error}; read it with the version that wrote it"
        ) from error


def read_seal(root: Path, part: int) -> PartSeal:
    """The seal of a part.

    Raises:
        PartMissing: The part is not sealed.
        CacheError: The seal is damaged.
    """
    path = layout.seal_path(root, part)
    try:
        seal = PartSeal.model_validate(layout.read_guarded_json(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PartMissing(
            f"part {part} of {root} is not sealed; run the same teacher-dump command to dump it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path} is damaged ({error}); run `cascache repair`, then dump the part again"
        ) from error
    bad_file = next((name for name in seal.files if not layout.is_part_file(name)), None)
    if seal.part != part or not layout.is_directory_of(seal.directory, part) or bad_file is not None:
        raise CacheError(
            f"{path} seals part {seal.part} in {seal.directory!r} ({bad_file!r}); run `cascache repair`"
        )
    return seal


def sealed_parts(root: Path) -> frozenset[int]:
    """Parts that have a seal."""
    seals = root / layout.SEALS
    if not seals.is_dir():
        return frozenset()
    names = (entry.name for entry in seals.iterdir() if (entry / layout.METADATA).is_file())
    return frozenset(int(name) for name in names if name.isdecimal())


class CacheWriter:
    """Writes parts of one cache; any number of writers may share it.

    Use `CacheWriter.open`.
    """

    def __init__(self, root: Path, manifest: Manifest, *, block_rows: int = BLOCK_ROWS) -> None:
        self.root = root
        self.manifest = manifest
        self._identity = layout.identity_sha256(manifest)
        self._block_rows = block_rows

    @classmethod
    def open(cls, path: str, manifest: Manifest, *, block_rows: int = BLOCK_ROWS) -> "CacheWriter":
        """Create a cache, or resume the one at `path`.

        Args:
            path: Directory of the cache.
            manifest: What the caller is about to write.
            block_rows: Rows a block aims at.

        Raises:
            MismatchError: Another identity lives there; every differing field is named.
            CacheError: The directory holds something else.
        """
        root = Path(path)
        root.mkdir(parents=True, exist_ok=True)
        if not (root / layout.METADATA).exists():
            ours = {layout.PARTS, layout.SEALS, layout.METADATA}
            foreign = sorted(
                e.name for e in root.iterdir() if e.name not in ours and not e.name.startswith(".new-")
            )
            if foreign:
                raise CacheError(
                    f"{root} is not empty ({foreign[0]}, ...) and not a cache; give another --out"
                )
            _create(root, manifest)
        found = read_manifest(root)
        lines = layout.differing_fields(layout.identity_fields(found), layout.identity_fields(manifest))
        if lines:
            listing = "\n  ".join(lines)
            raise MismatchError(
                f"{root} was dumped with other settings:\n  {listing}\nuse the same, or another --out"
            )
        return cls(root, found, block_rows=block_rows)

    @property
    def sealed(self) -> frozenset[int]:
        """Parts that are final, by any writer."""
        return sealed_parts(self.root)

    def write_part(
        self,
        part: int,
        records: Sequence[Record],
        *,
        first_sample: int,
        num_samples: int,
        quarantined: Sequence[Quarantined] = (),
    ) -> PartSeal:
        """Write a part and seal it.

        Args:
            part: Index of the part.
            records: Its samples; neighbours that share an image share its knowledge.
            first_sample: Plan index of the part's first sample.
            num_samples: Samples of the plan in this part: records and quarantined ones.
            quarantined: Samples without a record, with the reason.

        Returns:
            The part's seal: another writer's, when that one was first.

        Raises:
            DataError: A record breaks the promises of `common.record`.
            CacheError: The disk refuses.
        """
        self._check(part, records, num_samples=num_samples, num_missing=len(quarantined))
        groups = list(group_blocks(records, self._block_rows))
        packed = pack_part(groups, self.manifest)
        name = layout.new_directory(part)
        working = self.root / layout.WRITING / name
        try:
            working.mkdir(parents=True)
            write_part_files(working, packed, profile=self.manifest.encoding.profile)
            visual = [v for group in groups for v in unique_images(group).values()]
            seal = PartSeal(
                part=part,
                directory=name,
                identity_sha256=self._identity,
                first_sample=first_sample,
                num_samples=num_samples,
                num_records=len(records),
                num_images=len(visual),
                num_response_rows=sum(len(r.response.positions) for r in records),
                num_visual_rows=sum(len(v.topk.positions) for v in visual if v.topk is not None),
                errors=packed.errors,
                fidelity=_fidelity(records),
                quarantined=tuple(quarantined),
                files=hash_files(working),
            )
            return self._publish(working, seal)
        except OSError as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"part {part} cannot be written to {self.root} ({error}); mend the disk, then run it again"
            ) from error
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def _check(self, part: int, records: Sequence[Record], *, num_samples: int, num_missing: int) -> None:
        if not 0 <= part < max(1, self.manifest.num_parts):
            raise DataError(
                f"part {part} is outside the plan's {self.manifest.num_parts} parts", reason="plan"
            )
        if len(records) + num_missing != num_samples:
            raise DataError(
                f"part {part}: {len(records)} records and {num_missing} quarantined are not {num_samples}",
                reason="plan",
            )
        if len({r.sample_id for r in records}) != len(records):
            raise DataError(f"part {part}: a sample id occurs twice", reason="duplicate")

    def _publish(self, working: Path, seal: PartSeal) -> PartSeal:
        """Move a finished directory into place and seal it; the first seal wins."""
        final = self.root / layout.PARTS / seal.directory
        working.rename(final)
        sync_directory(final.parent)
        path = layout.seal_path(self.root, seal.part)
        path.parent.mkdir(parents=True, exist_ok=True)
        if link_new(path, layout.guarded_json(seal.model_dump(mode="json"))):
            sync_directory(path.parent)
            sync_directory(path.parent.parent)
            return seal
        shutil.rmtree(final, ignore_errors=True)
        log.warning("part %d was sealed by another writer meanwhile; its copy is kept", seal.part)
        return read_seal(self.root, seal.part)

    def finalize(self) -> None:
        """Write the index that makes opening fast.

        Raises:
            PartMissing: Parts are not sealed yet.
        """
        missing = sorted(set(range(self.manifest.num_parts)) - self.sealed)
        if missing:
            raise PartMissing(
                f"{self.root} lacks {len(missing)} of {self.manifest.num_parts} parts ({missing[:6]} ...); "
                f"run the same teacher-dump command to dump them"
            )
        from common.cache.index import write_index

        write_index(self.root, self.manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between parts."""


def _create(root: Path, manifest: Manifest) -> None:
    """Create the root, parts and seals groups; the first of several creators wins."""
    for name in (layout.PARTS, layout.SEALS):
        (root / name).mkdir(exist_ok=True)
        link_new(root / name / layout.METADATA, layout.group_json({}))
    link_new(root / layout.METADATA, layout.guarded_json(manifest.model_dump(mode="json")))
    sync_directory(root)


def link_new(path: Path, data: bytes) -> bool:
    """Create a file whole and synced, unless it exists. Returns whether this call created it."""
    temporary = path.parent / f".new-{os.getpid()}-{os.urandom(6).hex()}"
    write_synced(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def hash_files(directory: Path) -> dict[str, FileSeal]:
    """Size and SHA-256 of every file below a directory, by relative path."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hash_file(p) for p in files}


def hash_file(path: Path) -> FileSeal:
    """Size and SHA-256 of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSeal(size_bytes=file.tell(), sha256=digest)


def group_blocks(records: Sequence[Record], block_rows: int) -> Iterator[Sequence[Record]]:
    """Cut a part's samples into blocks of about `block_rows` rows, whole samples each.

    A block ends only between two samples that share no image, so that its knowledge is stored once;
    a block may grow to twice its aim for that.
    """
    start, rows, seen = 0, 0, set[str]()
    for i, record in enumerate(records):
        fresh = {v.key: v for v in record.visual if v.key not in seen}
        added = len(record.response.positions) + sum(
            len(v.topk.positions) for v in fresh.values() if v.topk is not None
        )
        shares = any(v.key in seen for v in record.visual)
        full = rows + added > block_rows * (2 if shares else 1) or i - start >= MAX_BLOCK_SAMPLES
        if i > start and full:
            yield records[start:i]
            start, rows, seen = i, 0, set()
            fresh = {v.key: v for v in record.visual}
            added = len(record.response.positions) + sum(
                len(v.topk.positions) for v in fresh.values() if v.topk is not None
            )
        rows += added
        seen |= fresh.keys()
    if start < len(records):
        yield records[start:]


def _fidelity(records: Sequence[Record]) -> dict[str, float]:
    """How much of the teacher's mass the kept ids hold."""
    tables = {
        "response": [r.response.log_tail[:, 0] for r in records if len(r.response.positions)],
        "visual": [
            v.topk.log_tail[:, 0]
            for r in records
            for v in r.visual
            if v.topk is not None and len(v.topk.positions)
        ],
    }
    out = {}
    for table, tails in tables.items():
        if tails:
            mass = 1 - np.exp(np.concatenate(tails).astype(np.float64))
            for percent in (5, 50):
                out[f"{table}_mass_p{percent:02d}"] = float(np.percentile(mass, percent))
    return out
