"""Where things lie inside a cache, and which names may occur there.

    l1/
    ├── zarr.json                    root group; attributes = manifest
    ├── parts/00012-9f31c2/          one part: a Zarr group of arrays
    │   └── response_codes/c.0.0     one shard: all blocks of that array
    ├── seals/00012/zarr.json        a Zarr group whose attributes are the seal; it names the part's directory
    ├── index/                       written by finalize: what opening needs
    └── .writing/00013-77aa01/       unfinished; renamed into parts/ when complete

A part exists once its seal does. Directory names carry a random suffix, so two writers of one part never
touch each other's files; the seal, created only if absent, decides who won.
"""

import hashlib
import json
import re
import secrets
from typing import Any, Final

from common.cache.documents import parse_document
from schemas.manifest import LOCATION_FIELDS, Manifest

PARTS: Final = "parts"
SEALS: Final = "seals"
INDEX: Final = "index"
WRITING: Final = ".writing"
METADATA: Final = "zarr.json"
GUARD: Final = "sha256"
"""Attribute of the root, of parts, of seals and of the index: SHA-256 over the other attributes."""

KNOWN_NAMES: Final = frozenset({METADATA, PARTS, SEALS, INDEX, WRITING})
"""Everything that may stand at the root of a cache."""

_LATER_FIELDS: Final = (("with_images",), ("without_text",), ("image_settings",), ("teacher", "head_dtype"))
"""Identity fields that were added later: they count only when they are set."""

_PART = re.compile(r"[0-9]{5,9}")
_DIRECTORY = re.compile(r"([0-9]{5,9})-[0-9a-f]{6,32}")
_FILE = re.compile(r"[a-z_]+/(c\.0\.0|zarr\.json)|zarr\.json")


def part_name(part: int) -> str:
    """The five-digit (or longer) name that a part's seal has."""
    return f"{part:05d}"


def is_seal_name(name: str) -> bool:
    """Whether `name` is exactly what `part_name` makes: two names never mean one part."""
    return _PART.fullmatch(name) is not None and name == part_name(int(name))


def new_directory(part: int) -> str:
    """A directory name for a part that no other writer uses."""
    return f"{part_name(part)}-{secrets.token_hex(6)}"


def derived_directory(part: int, source: str, identity_sha256: str) -> str:
    """The directory of a part taken from another: the same in every attempt, so that one can go on."""
    return f"{part_name(part)}-{_digest([source, identity_sha256])[:24]}"


def is_directory_of(name: str, part: int) -> bool:
    """Whether `name` is a plain directory name that belongs to `part`."""
    match = _DIRECTORY.fullmatch(name)
    return match is not None and match.group(1) == part_name(part)


def is_part_file(path: str) -> bool:
    """Whether a sealed path is one that a part may hold: it cannot leave the part's directory."""
    return _FILE.fullmatch(path) is not None


def seal_key(part: int) -> str:
    """The file whose existence makes a part final."""
    return f"{SEALS}/{part_name(part)}/{METADATA}"


def group_json(attributes: dict[str, object]) -> bytes:
    """The metadata document of a Zarr v3 group with these attributes."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=1).encode()


def guarded_json(attributes: dict[str, object]) -> bytes:
    """A group document whose attributes carry a hash over themselves, so that no bit can flip unseen."""
    return group_json(attributes | {GUARD: _digest(attributes)})


def read_guarded_json(text: bytes) -> dict[str, object]:
    """The attributes of a document that `guarded_json` wrote, byte for byte.

    Raises:
        ValueError: It is anything else.
    """
    try:
        attributes = parse_document(text)["attributes"]
        found = attributes.pop(GUARD, None)
        if found != _digest(attributes) or guarded_json(attributes) != text:
            raise ValueError("its own checksum does not fit")
        return dict(attributes)
    except (RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no such document: {type(error).__name__}") from error


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def identity_fields(manifest: Manifest) -> dict[str, object]:
    """The manifest's fields that must be equal to share a cache, as JSON values."""
    left_out: dict[str, Any] = {**dict.fromkeys(LOCATION_FIELDS, True), "teacher": {"model": True}}
    fields: dict[str, object] = manifest.model_dump(mode="json", exclude=left_out)
    for *groups, name in _LATER_FIELDS:
        owner: Any = fields
        for group in groups:
            owner = owner[group]
        if not owner[name]:
            del owner[name]  # so that the identity of older caches does not change
    return fields


def identity_sha256(manifest: Manifest) -> str:
    """Hash of the identity fields: what binds a part to its cache."""
    return _digest(identity_fields(manifest))


def differing_fields(found: dict[str, object], wanted: dict[str, object], prefix: str = "") -> list[str]:
    """Lines `field: found X, wanted Y` for every leaf that differs."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        ours, theirs = found.get(name), wanted.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += differing_fields(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            lines.append(f"{prefix}{name}: found {ours!r}, wanted {theirs!r}")
    return lines
