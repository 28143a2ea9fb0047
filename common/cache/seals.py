"""What a cache says of itself: its manifest, and the seals that make parts exist."""

from typing import Final

from pydantic import ValidationError

from common.cache import layout
from common.cache.places import Place, as_store
from common.cache.store import Store
from common.errors import CacheError, PartMissing
from schemas.manifest import Manifest, PartSeal

MAX_MANIFEST_BYTES: Final = 1 << 20
"""No manifest is larger; a writer's has about 3 kB."""

MAX_SEAL_BYTES: Final = 16 << 20
"""No seal is larger: 20 kB, and a line for each quarantined sample."""


def read_manifest(place: Place) -> Manifest:
    """The manifest of a cache.

    Args:
        place: Its directory, URL or store.

    Raises:
        CacheError: There is no cache, or its manifest is not of this format.
    """
    store = as_store(place)
    where = f"{store.name}/{layout.METADATA}"
    try:
        attributes = layout.read_guarded_json(store.read(layout.METADATA, max_bytes=MAX_MANIFEST_BYTES))
    except FileNotFoundError as error:
        raise CacheError(
            f"{store.name} is not a cache: {where} is missing; check the path, or dump one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{where} is damaged ({error}); restore it from another copy of the cache"
        ) from error
    try:
        return Manifest.model_validate(attributes)
    except ValidationError as error:
        raise CacheError(
            f"{where} is no manifest of format 1: {error}; read it with what wrote it"
        ) from error


def read_seal(place: Place, part: int) -> PartSeal:
    """The seal of a part.

    Args:
        place: The cache's directory, URL or store.
        part: Which part.

    Raises:
        PartMissing: The part is not sealed.
        CacheError: The seal is damaged.
    """
    store = as_store(place)
    key = layout.seal_key(part)
    try:
        seal = PartSeal.model_validate(layout.read_guarded_json(store.read(key, max_bytes=MAX_SEAL_BYTES)))
    except FileNotFoundError as error:
        raise PartMissing(
            f"part {part} of {store.name} is not sealed; run the same teacher-dump again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{store.name}/{key} is damaged ({error}); run `cascache repair`, then dump again"
        ) from error
    bad_file = next((name for name in seal.files if not layout.is_part_file(name)), None)
    if seal.part != part or not layout.is_directory_of(seal.directory, part) or bad_file is not None:
        found = f"part {seal.part} in {seal.directory!r} with {bad_file!r}"
        raise CacheError(f"{store.name}/{key} seals {found}; run `cascache repair`, then dump again")
    return seal


def sealed_parts(place: Place) -> frozenset[int]:
    """Parts that have a seal: one listing."""
    store: Store = as_store(place)
    names = store.names(layout.SEALS)
    parts = frozenset(int(name) for name in names if layout.is_seal_name(name))
    return frozenset(part for part in parts if _has_seal(store, part))


def _has_seal(store: Store, part: int) -> bool:
    """A killed writer may leave an empty directory; an object store has none."""
    return not store.is_local or bool(store.names(f"{layout.SEALS}/{layout.part_name(part)}"))
