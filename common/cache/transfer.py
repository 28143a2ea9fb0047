"""Sealed parts from one cache to another: merge, push and pull are one thing.

    source (directory or URL) ── same identity? ── file by file, hashes proven ──> target ── seal last

Stopped anywhere, the same command goes on; what is sealed in the target stays as it is.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from common.cache import layout
from common.cache.index import write_index
from common.cache.places import open_store
from common.cache.reader import scan_parts
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.store import MAX_WHOLE_BYTES, Store, sync_directory, write_synced
from common.cache.writer import CacheWriter
from common.errors import MismatchError, PartCorrupt
from schemas.manifest import PartSeal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Transferred:
    """What `transfer` did."""

    copied: tuple[int, ...]
    """Parts copied by this call."""
    kept: tuple[int, ...]
    """Parts that the target had already."""
    missing: tuple[int, ...]
    """Parts of the plan that nobody has."""


def transfer(sources: Sequence[str], target: str) -> Transferred:
    """Copy every sealed part that the target lacks; finalize the target when it is complete.

    Args:
        sources: Directories or URLs of caches of one identity, the preferred one first.
        target: Directory or URL; created when it does not exist.

    Raises:
        MismatchError: A source has another identity.
        PartCorrupt: A source's file is not what was sealed.
    """
    manifest = read_manifest(sources[0])
    writer = CacheWriter.open(target, manifest)
    kept, copied = sorted(writer.sealed), []
    for place in sources:
        source = open_store(place)
        found = layout.identity_fields(read_manifest(source))
        if lines := layout.differing_fields(found, layout.identity_fields(manifest)):
            listing = "\n  ".join(lines)
            raise MismatchError(
                f"{place} does not fit {sources[0]}:\n  {listing}\nmerge caches of one dump only"
            )
        for part in sorted(sealed_parts(source) - writer.sealed):
            copy_part(source, writer.store, read_seal(source, part))
            copied.append(part)
    missing = sorted(set(range(manifest.num_parts)) - writer.sealed)
    if not missing:
        write_index(writer.store, manifest, scan_parts(writer.store, manifest))
    return Transferred(tuple(copied), tuple(kept), tuple(missing))


def copy_part(source: Store, target: Store, seal: PartSeal) -> None:
    """Copy one part, proving every file against its seal on the way.

    Raises:
        PartCorrupt: A file is missing or differs.
    """
    base = f"{layout.PARTS}/{seal.directory}"
    working = target.working() / seal.directory
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    try:
        for name, wanted in seal.files.items():
            try:
                data = source.read(f"{base}/{name}", max_bytes=max(wanted.size_bytes, MAX_WHOLE_BYTES))
            except FileNotFoundError as error:
                raise PartCorrupt(f"{source.name}/{base}/{name} is missing; run `cascache verify`") from error
            if len(data) != wanted.size_bytes or hashlib.sha256(data).hexdigest() != wanted.sha256:
                raise PartCorrupt(
                    f"{source.name}/{base}/{name} is not what was sealed; run `cascache verify`"
                )
            path = working / name
            path.parent.mkdir(exist_ok=True)
            write_synced(path, data)
        for directory in {working, *(path.parent for path in working.glob("*/*"))}:
            sync_directory(directory)
        if not target.is_local or seal.directory not in target.names(layout.PARTS):
            target.add(working, base)
        if not target.create(layout.seal_key(seal.part), layout.guarded_json(seal.model_dump(mode="json"))):
            log.warning("part %d was sealed in %s by another writer meanwhile", seal.part, target.name)
    finally:
        shutil.rmtree(working, ignore_errors=True)
