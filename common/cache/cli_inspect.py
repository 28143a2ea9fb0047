"""`cascache info · verify · repair · finalize`: inspect, verify and repair a cache."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cache.commands import Answer, add_command

if TYPE_CHECKING:
    from schemas.manifest import Manifest, PartSeal


_ODD = (
    "these parts are as they were sealed, but do not decode here: read them with the cascache that wrote "
    "them, or give them up with `cascache repair --odd-too`"
)


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    path = "directory or URL of the cache"
    add_command(subparsers, "info", "what is in a cache", run_info).add_argument("path", help=path)
    verify = add_command(subparsers, "verify", "check every byte; reads only", run_verify)
    verify.add_argument("path", help=path)
    verify.add_argument("--expect", metavar="ROOT", help="the root hash it must have (sha256:...)")
    verify.add_argument("--key", help="public key (PEM) that must have signed it")
    verify.add_argument("--signature", help="file of the signature; default: the path with .sig behind it")
    verify.add_argument("--quick", action="store_true", help="names and sizes only: no hashing, no decoding")
    text = "unseal damaged parts and remove leftovers; run while no writer is at work"
    repair = add_command(subparsers, "repair", text, run_repair)
    repair.add_argument("path", help=path)
    repair.add_argument(
        "--odd-too",
        action="store_true",
        help="also parts whose files are as they were sealed but do not decode here: written by another "
        "version, or by a faulty writer",
    )
    text = "write the index of a complete cache, for a fast open"
    add_command(subparsers, "finalize", text, run_finalize).add_argument("path", help=path)


def run_info(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Counts, sizes and identity of a cache."""
    from common.cache.reader import CacheReader
    from common.cache.subset import held_groups
    from common.cache.trust import root_hash

    with CacheReader(arguments.path) as cache:
        seals = cache.seals.values()
        num_bytes = sum(file.size_bytes for seal in seals for file in seal.files.values())
        rows = sum(seal.num_response_rows + seal.num_visual_rows for seal in seals)
        answer = {
            "path": arguments.path,
            "root": root_hash(cache.store),
            "teacher": cache.manifest.teacher.model,
            "complete": cache.complete,
            "partial": None if cache.complete else _missing_text(cache.seals, cache.manifest),
            "arrays": list(held_groups(cache.manifest)),
            "left_out": list(derived.left_out) if (derived := cache.manifest.derived_from) else [],
            "parts": f"{len(cache.seals)} of {cache.manifest.num_parts}",
            "records": cache.num_samples,
            "quarantined": sum(len(seal.quarantined) for seal in seals),
            "images": sum(seal.num_images for seal in seals),
            "response_rows": sum(seal.num_response_rows for seal in seals),
            "visual_rows": sum(seal.num_visual_rows for seal in seals),
            "bytes": num_bytes,
            "bytes_per_position": round(num_bytes / rows, 2) if rows else None,
            "bytes_by_array": _bytes_by_array(seals),
            "fidelity": _worst(seals, "fidelity", min),
            "errors": _worst(seals, "errors", max),
            "manifest": cache.manifest.model_dump(mode="json"),
        }
    return 0, answer


def _bytes_by_array(seals: Iterable["PartSeal"]) -> dict[str, int]:
    """Bytes of each array over all parts, largest first."""
    sizes = Counter[str]()
    for seal in seals:
        for name, file in seal.files.items():
            sizes[name.split("/")[0]] += file.size_bytes
    return dict(sizes.most_common())


def _worst(
    seals: Iterable["PartSeal"], field: str, worse: Callable[[float, float], float]
) -> dict[str, float]:
    """The worst of all parts, number by number."""
    found: dict[str, float] = {}
    for seal in seals:
        for name, value in getattr(seal, field).items():
            found[name] = worse(found.get(name, value), value)
    return found


def _missing_text(seals: Mapping[int, "PartSeal"], manifest: "Manifest") -> str:
    """Which samples of the plan are not here."""
    covered = sum(seal.num_samples for seal in seals.values())
    first = next((part for part in range(manifest.num_parts) if part not in seals), 0)
    return (
        f"holds {covered} of {manifest.samples.num_samples} planned samples; part {first} is the first one "
        f"missing: pull again without --samples, or dump on"
    )


def run_verify(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Problems, and the parts to dump again."""
    from dataclasses import asdict

    from common.cache import layout
    from common.cache.places import open_store
    from common.cache.seals import read_manifest
    from common.cache.verify import verify

    trusted = _check_trust(arguments)
    store = open_store(arguments.path, copied=False)
    if not {layout.PARTS, layout.SEALS} & set(store.names("")):
        read_manifest(store)  # says that there is no cache
    report = verify(arguments.path, deep=not arguments.quick)
    answer = (
        trusted
        | asdict(report)
        | {"bad_parts": report.bad_parts, "complete": report.complete, "ok": report.ok}
    )
    answer["checked"] = "every byte" if report.deep else "names and sizes only, not the contents"
    if report.odd_parts and set(report.odd_parts) == set(report.bad_parts):
        answer["next"] = _ODD
    elif not report.ok:
        answer["next"] = "cascache repair, then the same teacher-dump command; or copy the cache again"
    elif not report.complete:
        answer["next"] = "run the same teacher-dump command to dump the missing parts"
    return int(not (report.ok and report.complete)), answer


def _check_trust(arguments: argparse.Namespace) -> Answer:
    """Hold the root to what was pinned and signed, before any byte is hashed."""
    from common.cache.places import open_store
    from common.cache.trust import check_signature, require_root, root_hash, signature_path

    if not (arguments.expect or arguments.key):
        return {}
    store = open_store(arguments.path, copied=False)
    if arguments.expect:
        require_root(store, arguments.expect)
    root = root_hash(store)
    if arguments.key:
        signature = arguments.signature or signature_path(arguments.path)
        check_signature(root, Path(signature), Path(arguments.key))
    return {"root": root, "pinned": bool(arguments.expect), "signed": bool(arguments.key)}


def run_repair(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Unseal and clean; says what to dump again."""
    from common.cache.verify import repair, verify

    report = verify(arguments.path)
    parts = repair(report, odd_too=arguments.odd_too)
    kept = [] if arguments.odd_too else report.odd_parts
    answer: Answer = {
        "path": arguments.path,
        "unsealed": [part for part in report.bad_parts if part not in kept],
        "parts_to_dump": parts,
    }
    if kept:
        answer |= {"odd_parts_kept": kept, "next": _ODD}
    elif parts:
        answer["next"] = "run the same teacher-dump command"
    return int(bool(kept)), answer


def run_finalize(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Write the index."""
    from common.cache.seals import read_manifest
    from common.cache.writer import CacheWriter

    writer = CacheWriter.open(arguments.path, read_manifest(arguments.path))
    writer.finalize()
    return 0, {"path": arguments.path, "parts": len(writer.sealed)}
