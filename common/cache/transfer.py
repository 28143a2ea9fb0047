"""Sealed parts from one cache to another: merge, push and pull are one thing.

    source (directory or URL) ── same identity? ── file by file, hashes proven ──> landing ── seal last

    part 3   ■■■■ sealed         Files of several parts are copied side by side. Stopped anywhere, the same
    part 4   ■■▪▪                command goes on: sealed parts stay as they are, files of unsealed ones are
    part 5   ▪▪                  proven and used.

Fewer samples are fewer parts, with their seals untouched; fewer arrays are new parts (`subset.py`).
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from tqdm import tqdm

from common.cache import layout
from common.cache.index import Index, index_directory, write_index
from common.cache.landing import Landing, land, proven
from common.cache.places import open_store
from common.cache.reader import scan_parts
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.store import Store
from common.cache.subset import (
    GROUPS,
    Group,
    PartFiles,
    covering_parts,
    held_groups,
    same_part,
    subset_manifest,
    subset_part,
)
from common.cache.writer import CacheWriter
from common.errors import MismatchError
from schemas.manifest import FileSeal, Manifest

log = logging.getLogger(__name__)

Copying = Future[tuple[int, bool]]
"""A file on its way: its size, and whether an interrupted call had copied it."""

JOBS: Final = 16
"""Files copied side by side, unless told otherwise."""

PARTS_IN_FLIGHT: Final = 4
"""Parts whose files are copied side by side."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """What `transfer` did."""

    copied: tuple[int, ...]
    """Parts copied by this call."""
    kept: tuple[int, ...]
    """Parts that the target had already."""
    missing: tuple[int, ...]
    """Parts asked for that nobody has."""
    num_parts: int
    """Parts of the finished level."""
    copied_bytes: int
    """Bytes of files copied by this call."""
    reused_bytes: int
    """Bytes of files that an interrupted call had copied."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place that parts come from."""

    store: Store
    parts: frozenset[int]
    """Those sealed there."""


def transfer(
    sources: Sequence[str],
    target: str,
    *,
    num_samples: int | None = None,
    keep: Iterable[Group] = GROUPS,
    jobs: int = JOBS,
    progress: bool = False,
) -> Transferred:
    """Copy every sealed part that the target lacks, and write its index.

    Args:
        sources: Directories or URLs of caches of one identity, the preferred one first.
        target: Directory or URL; created when it does not exist.
        num_samples: Copy only the parts that hold the first so many samples of the plan; None for all.
        keep: Groups of arrays to copy.
        jobs: Files copied side by side.
        progress: Whether to draw a bar.

    Raises:
        MismatchError: A source has another identity, or the target holds another subset of arrays.
        PartCorrupt: A source's file is not what was sealed.
    """
    began, manifest = time.perf_counter(), read_manifest(sources[0])
    wanted, keep = subset_manifest(manifest, keep), frozenset(keep)
    opened = [_open_source(place, manifest, sources[0]) for place in sources]
    asked = frozenset(covering_parts(manifest, num_samples))
    writer = _open_target(target, wanted)
    kept = sorted(writer.sealed)
    with ThreadPoolExecutor(jobs, thread_name_prefix="copy") as pool:
        mover = Mover(pool, writer, manifest, lost=tuple(g for g in held_groups(manifest) if g not in keep))
        todo = mover.plan(opened, asked - frozenset(kept))
        total = sum(file.size_bytes for _, part in todo for file in part.seal.files.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="copy", disable=not progress) as bar:
            for number in mover.run(todo):
                bar.update(number)
    if todo or (writer.sealed and index_directory(writer.store) is None):
        write_index(writer.store, wanted, _scan(writer, opened, wanted))
    writer.store.tidy()
    return Transferred(
        copied=tuple(part.seal.part for _, part in todo),
        kept=tuple(kept),
        missing=tuple(sorted(asked - writer.sealed)),
        num_parts=manifest.num_parts,
        copied_bytes=total - mover.reused_bytes,
        reused_bytes=mover.reused_bytes,
        seconds=round(time.perf_counter() - began, 3),
    )


def _open_source(place: str, manifest: Manifest, first: str) -> Source:
    store = open_store(place, copied=False)
    found = layout.identity_fields(read_manifest(store))
    if lines := layout.differing_fields(found, layout.identity_fields(manifest)):
        listing = "\n  ".join(lines)
        raise MismatchError(f"{place} does not fit {first}:\n  {listing}\nmerge caches of one dump only")
    return Source(store, sealed_parts(store))


def _scan(writer: CacheWriter, sources: Sequence[Source], wanted: Manifest) -> Index:
    """The index of the target; from the disk it was pushed from, where that holds the very same parts."""
    target, store = writer.store, sources[0].store
    sealed = writer.sealed
    same = store.is_local and not target.is_local and len(sources) == 1 and sealed <= sources[0].parts
    if not same or any(_document(store, part) != _document(target, part) for part in sealed):
        return scan_parts(target, wanted)
    return scan_parts(store, wanted, skip=dict.fromkeys(sources[0].parts - sealed, ""))


def _document(store: Store, part: int) -> bytes:
    return store.read(layout.seal_key(part))


def _open_target(target: str, wanted: Manifest) -> CacheWriter:
    try:
        return CacheWriter.open(target, wanted)
    except MismatchError as error:
        raise MismatchError(
            f"{error}\n(a cache holds one subset of arrays: the same --arrays and --strip-... every time)"
        ) from error


class Mover:
    """Copies parts, files side by side."""

    def __init__(
        self, pool: ThreadPoolExecutor, writer: CacheWriter, manifest: Manifest, *, lost: Sequence[Group]
    ) -> None:
        """Start with nothing in flight.

        Args:
            pool: Does the copying.
            writer: The target.
            manifest: The sources' identity.
            lost: Groups of arrays to leave out.
        """
        self._pool, self._target, self._lost = pool, writer.store, lost
        self._wanted = writer.manifest
        self._source_identity = layout.identity_sha256(manifest)
        self.reused_bytes = 0

    def plan(self, sources: Sequence[Source], wanted: frozenset[int]) -> list[tuple[Source, PartFiles]]:
        """Which part comes from where, and what it will be: all seals read side by side."""
        chosen: dict[int, Source] = {}
        for source in sources:
            for part in source.parts & wanted:
                chosen.setdefault(part, source)
        parts = sorted(chosen)
        files = self._pool.map(lambda part: self._describe(chosen[part].store, part), parts)
        return [(chosen[part], described) for part, described in zip(parts, files, strict=True)]

    def _describe(self, store: Store, part: int) -> PartFiles:
        document = store.read(layout.seal_key(part))
        seal = read_seal(store, part)
        if seal.identity_sha256 != self._source_identity:
            raise MismatchError(
                f"part {part} of {store.name} was sealed for another cache; run `cascache repair`"
            )
        if not self._lost:
            return same_part(seal, document)
        return subset_part(store, seal, document, lost=self._lost, wanted=self._wanted)

    def run(self, todo: Sequence[tuple[Source, PartFiles]]) -> Iterator[int]:
        """Copy parts and seal them in order; yields bytes as files land.

        Raises:
            PartCorrupt: A file is missing or differs.
        """
        flying: deque[tuple[PartFiles, Landing, list[Copying]]] = deque()
        try:
            for source, part in todo:
                landing = land(self._target, part.seal)
                files = sorted(part.seal.files.items(), key=lambda item: -item[1].size_bytes)
                futures = [self._pool.submit(self._copy, source, part, landing, *file) for file in files]
                flying.append((part, landing, futures))
                if len(flying) >= PARTS_IN_FLIGHT:
                    yield from self._seal(*flying.popleft())
            while flying:
                yield from self._seal(*flying.popleft())
        finally:
            for _, _, futures in flying:
                for future in futures:
                    future.cancel()

    def _copy(
        self, source: Source, part: PartFiles, landing: Landing, name: str, file: FileSeal
    ) -> tuple[int, bool]:
        """One file; returns its size, and whether it was there."""
        if landing.holds(name, file):
            return file.size_bytes, True
        if name in part.written:
            pieces: Iterable[bytes] = [part.written[name]]
        else:
            key = f"{part.source}/{name}"
            pieces = proven(source.store.pieces(key), file, f"{source.store.name}/{key}")
        landing.write(name, pieces, file.size_bytes)
        return file.size_bytes, False

    def _seal(self, part: PartFiles, landing: Landing, futures: Sequence[Copying]) -> Iterator[int]:
        for future in futures:
            size, reused = future.result()
            self.reused_bytes += size if reused else 0
            yield size
        landing.finish()
        number, place = part.seal.part, self._target.name
        if not self._target.create(layout.seal_key(number), part.document):
            log.warning("part %d was sealed in %s by another writer meanwhile", number, place)
