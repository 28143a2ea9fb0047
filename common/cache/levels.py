"""What levels lie in a place, and how much of each: manifests and seals, no data."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from common.cache import layout
from common.cache.places import open_store
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.subset import held_groups
from common.errors import CacheError

_THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class Level:
    """One cache, from its manifest and seals."""

    name: str
    """Its name in the place; `.` for the place itself."""
    path: str
    """What to open it by."""
    teacher: str
    """The model it was dumped from, by the name asked for."""
    complete: bool
    """Whether every part of the plan is sealed."""
    parts: str
    """`sealed of planned`."""
    samples: int
    """Records held."""
    positions: int
    """Rows held, of responses and images."""
    bytes: int
    """Size of all sealed files."""
    arrays: tuple[str, ...]
    """Groups of arrays held."""


def list_levels(place: str) -> Iterator[Level]:
    """The caches in a directory or below a prefix, or the cache that is there itself.

    Raises:
        CacheError: There is none, or one is damaged.
    """
    names = open_store(place, copied=False).names("")
    if layout.METADATA in names:
        yield describe(place, ".")
        return
    found = 0
    for name in names:
        path = f"{place.rstrip('/')}/{name}"
        if layout.METADATA in open_store(path, copied=False).names(""):
            found += 1
            yield describe(path, name)
    if not found:
        raise CacheError(f"{place} holds no cache; check the path")


def describe(path: str, name: str) -> Level:
    """One cache in a few numbers.

    Raises:
        CacheError: Its manifest or a seal is damaged.
    """
    store = open_store(path, copied=False)
    manifest, parts = read_manifest(store), sorted(sealed_parts(store))
    with ThreadPoolExecutor(_THREADS) as pool:
        seals = list(pool.map(lambda part: read_seal(store, part), parts))
    return Level(
        name=name,
        path=path,
        teacher=manifest.teacher.model,
        complete=len(parts) == manifest.num_parts,
        parts=f"{len(parts)} of {manifest.num_parts}",
        samples=sum(seal.num_records for seal in seals),
        positions=sum(seal.num_response_rows + seal.num_visual_rows for seal in seals),
        bytes=sum(file.size_bytes for seal in seals for file in seal.files.values()),
        arrays=held_groups(manifest),
    )
