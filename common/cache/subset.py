"""Less of a cache: which parts hold the first samples, and parts without some of their arrays.

    topk        top-k rows at response positions      always kept, with spans
    text        token ids outside images         ┐
    visual      top-k rows at image positions    │
    relation    relation factors                 │    may be left out: the manifest then says what a dump
    hidden      hidden states of images          │    without them would say, and every part gets a new
    images      encoded image files              ┘    seal, which names the old one

Files that stay are copied and keep their hashes; few are written anew (`rewrite.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from common.cache import layout
from common.cache.landing import proven
from common.cache.rewrite import PartArrays, without_counts, without_text
from common.cache.shard import SHARD_NAME, chunk_checks
from common.cache.store import Store
from common.errors import ConfigError, PartCorrupt
from schemas.arrays import IMAGE_FILE_ARRAYS, ROW_ARRAYS
from schemas.manifest import Derived, FileSeal, Manifest, PartSeal

Group = Literal["topk", "text", "visual", "relation", "hidden", "images"]

GROUPS: Final[tuple[Group, ...]] = get_args(Group)

ARRAYS: Final[Mapping[Group, frozenset[str]]] = {
    "text": frozenset(),
    "visual": frozenset(f"visual_{spec.name}" for spec in ROW_ARRAYS),
    "relation": frozenset({"image_factor", "image_factor_scale"}),
    "hidden": frozenset({"image_hidden", "image_hidden_scale"}),
    "images": frozenset(IMAGE_FILE_ARRAYS),
}
"""Arrays of each group that may be left out."""

_COLUMN: Final[Mapping[Group, str]] = {"visual": "num_rows", "relation": "rank", "hidden": "hidden_width"}
_ERROR: Final[Mapping[Group, str]] = {"relation": "factor_relation", "hidden": "hidden"}


def held_groups(manifest: Manifest) -> tuple[Group, ...]:
    """What a cache holds."""
    store = manifest.relation.store
    held: dict[Group, bool] = {
        "topk": manifest.capture.positions != "visual",
        "text": not manifest.without_text,
        "visual": manifest.capture.positions != "response" and manifest.capture.visual_fraction > 0,
        "relation": store in ("factor", "both"),
        "hidden": store in ("hidden", "both"),
        "images": manifest.with_images,
    }
    return tuple(group for group in GROUPS if held[group])


def parse_arrays(text: str) -> frozenset[Group]:
    """The groups to keep, from `topk,visual`; text stays.

    Raises:
        ConfigError: An unknown group, or `topk` is not among them.
    """
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - set(GROUPS))
    if unknown or "topk" not in names:
        found = (
            f"does not know {unknown[0]!r}" if unknown else f"{text!r} leaves out topk, which always stays"
        )
        raise ConfigError(f"--arrays {found}; give topk, and any of {', '.join(GROUPS[2:])}")
    return frozenset(group for group in GROUPS if group in names | {"text"})


def parse_samples(text: str) -> int:
    """How many samples, from `first:10000`.

    Raises:
        ConfigError: It is anything else.
    """
    head, _, number = text.partition(":")
    if head != "first" or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--samples {text!r} is not understood; give first:N, such as first:10000")
    return int(number)


def covering_parts(manifest: Manifest, num_samples: int | None) -> range:
    """The parts that hold the first samples of the plan: whole ones, so up to a part's samples more."""
    if num_samples is None:
        return range(manifest.num_parts)
    return range(min(manifest.num_parts, -(-num_samples // manifest.part_samples)))


def subset_manifest(manifest: Manifest, keep: Iterable[Group]) -> Manifest:
    """The manifest of a cache that keeps only these groups; the same one when nothing is lost.

    Raises:
        ConfigError: What is left could not have been dumped.
    """
    lost = tuple(group for group in held_groups(manifest) if group not in keep)
    if not lost:
        return manifest
    if "visual" in lost and manifest.capture.positions != "response+visual":
        raise ConfigError(f"the cache holds {manifest.capture.positions} rows only; they cannot be left out")
    if "text" in lost and manifest.capture.responses == "teacher":
        raise ConfigError(
            "the responses are the teacher's own and in no data: without text nobody knows them"
        )
    left = [g for g in held_groups(manifest) if g in ("relation", "hidden") and g not in lost]
    names: dict[tuple[str, ...], str] = {("relation", "hidden"): "both", ("relation",): "factor"}
    store = names.get(tuple(left), left[0] if left else "none")
    positions = "response" if "visual" in lost else manifest.capture.positions
    before = manifest.derived_from
    derived = Derived(
        identity_sha256=before.identity_sha256 if before else layout.identity_sha256(manifest),
        left_out=tuple(g for g in GROUPS if g in lost or (before is not None and g in before.left_out)),
    )
    fields = manifest.model_dump() | {
        "capture": manifest.capture.model_dump() | {"positions": positions},
        "relation": manifest.relation.model_dump() | {"store": store},
        "with_images": manifest.with_images and "images" not in lost,
        "without_text": manifest.without_text or "text" in lost,
        "derived_from": derived.model_dump(),
    }
    return Manifest.model_validate(fields)


@dataclass(frozen=True, slots=True)
class PartFiles:
    """What a part of the target will be."""

    seal: PartSeal
    """Its seal."""
    document: bytes
    """The seal as it will stand in the target."""
    source: str
    """Key of the part's directory in the source."""
    written: Mapping[str, bytes]
    """Files that do not come from the source as they are."""


def same_part(seal: PartSeal, document: bytes) -> PartFiles:
    """A part that is copied as it is, seal and all."""
    return PartFiles(seal, document, f"{layout.PARTS}/{seal.directory}", {})


def subset_part(
    store: Store, seal: PartSeal, document: bytes, *, lost: Iterable[Group], wanted: Manifest
) -> PartFiles:
    """A part without some groups.

    Args:
        store: The source.
        seal: The part's seal there.
        document: The same as it stands there.
        lost: Groups to leave out.
        wanted: The target's manifest.

    Raises:
        PartCorrupt: A file that has to be read is not what was sealed.
    """
    lost, identity_sha256, profile = tuple(lost), layout.identity_sha256(wanted), wanted.encoding.profile
    doomed = frozenset[str]().union(*(ARRAYS[group] for group in lost))
    base = f"{layout.PARTS}/{seal.directory}"

    def read(name: str) -> bytes:
        where = f"{base}/{name}"
        return b"".join(proven(store.pieces(where), seal.files[name], f"{store.name}/{where}"))

    try:
        attributes = layout.read_guarded_json(read(layout.METADATA))
        arrays, ids = (dict(attributes[name]) for name in ("arrays", "ids"))  # type: ignore[call-overload]
        written = _rewrite(PartArrays(read, arrays, profile), arrays, lost)
    except (ValueError, KeyError, TypeError) as error:
        raise PartCorrupt(f"{store.name}/{base} is damaged ({error}); run `cascache verify`") from error
    for key, data in written.items():
        name, _, file = key.partition("/")
        if file == SHARD_NAME:
            arrays[name] = {**arrays[name], "chunks": chunk_checks(data, len(arrays[name]["lengths"]))}
    arrays = {name: used for name, used in arrays.items() if name not in doomed}
    if "visual" in lost:
        ids.pop("visual", None)
    written[layout.METADATA] = layout.guarded_json(attributes | {"arrays": arrays, "ids": ids})
    files = {name: file for name, file in seal.files.items() if name.partition("/")[0] not in doomed}
    files |= {
        name: FileSeal(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in written.items()
    }
    changed = seal.model_copy(
        update={
            "directory": layout.derived_directory(seal.part, seal.directory, identity_sha256),
            "identity_sha256": identity_sha256,
            "derived_from": hashlib.sha256(document).hexdigest(),
            "num_visual_rows": 0 if "visual" in lost else seal.num_visual_rows,
            "errors": {k: v for k, v in seal.errors.items() if k not in {_ERROR.get(g) for g in lost}},
            "fidelity": {
                k: v for k, v in seal.fidelity.items() if "visual" not in lost or not k.startswith("visual_")
            },
            "files": dict(sorted(files.items())),
        }
    )
    return PartFiles(changed, layout.guarded_json(changed.model_dump(mode="json")), base, written)


def _rewrite(part: PartArrays, arrays: dict[str, Any], lost: Sequence[Group]) -> dict[str, bytes]:
    """Files of the arrays that change; `arrays` gets what is new."""
    columns = [_COLUMN[group] for group in lost if group in _COLUMN]
    written = without_counts(part, columns) if columns and "image_columns" in arrays else {}
    if "text" in lost:
        files, arrays["sample_token_hashes"] = without_text(part)
        written |= files
    return written
