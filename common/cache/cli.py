"""The `cascache` command: look at a cache, prove it, mend it.

exit code   0 all is well · 1 problems, or parts are missing · 2 the command could not be carried out
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from common.errors import CascacheError

EPILOG = (
    "exit codes: 0 all is well; 1 problems were found, or parts are missing; "
    "2 the command could not be carried out"
)


def build_parser() -> argparse.ArgumentParser:
    """Every sub-command and flag."""
    parser = argparse.ArgumentParser(
        prog="cascache", description="Inspect, prove and mend caches.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "info": "what is in a cache",
        "verify": "check every byte; reads only",
        "repair": "unseal damaged parts and remove leftovers; run while no writer is at work",
        "finalize": "write the index of a complete cache, for a fast open",
    }.items():
        command = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        command.add_argument("path", help="directory of the cache")
        command.add_argument("--json", action="store_true", help="one JSON object instead of text")
        if name == "verify":
            command.add_argument(
                "--quick", action="store_true", help="names and sizes only: no hashing, no decoding"
            )
    for name, text in {
        "merge": "copy the sealed parts of caches of one identity into another",
        "push": "copy a cache to an object store, or any other place",
        "pull": "copy a cache from an object store, or any other place",
    }.items():
        command = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        if name == "merge":
            command.add_argument("target", help="directory or URL to copy to; created when it does not exist")
            command.add_argument("sources", nargs="+", help="directories or URLs to copy from")
        else:
            command.add_argument("sources", nargs=1, metavar="source", help="directory or URL to copy from")
            command.add_argument("target", help="directory or URL to copy to")
        command.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    commands = {"info": run_info, "verify": run_verify, "repair": run_repair, "finalize": run_finalize}
    run = commands.get(arguments.command, run_transfer)
    try:
        code, answer = run(arguments)
    except CascacheError as error:
        print(f"cascache: error: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(answer, indent=1) if arguments.json else to_text(answer), flush=True)
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def to_text(answer: dict[str, Any], indent: str = "") -> str:
    """One line a field; what is nested stands below it, indented."""
    lines = []
    for name, value in answer.items():
        title = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict) and value:
            lines += [title, to_text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [title] + [f"{indent}  " + "  ".join(str(v) for v in entry.values()) for entry in value]
        else:
            lines.append(f"{title} {value}")
    return "\n".join(lines)


def run_info(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Counts, sizes and identity of a cache."""
    from common.cache.reader import CacheReader

    with CacheReader(arguments.path) as cache:
        seals = cache.seals.values()
        num_bytes = sum(file.size_bytes for seal in seals for file in seal.files.values())
        rows = sum(seal.num_response_rows + seal.num_visual_rows for seal in seals)
        answer = {
            "path": arguments.path,
            "teacher": cache.manifest.teacher.model,
            "complete": cache.complete,
            "parts": f"{len(cache.seals)} of {cache.manifest.num_parts}",
            "records": cache.num_samples,
            "quarantined": sum(len(seal.quarantined) for seal in seals),
            "images": sum(seal.num_images for seal in seals),
            "response_rows": sum(seal.num_response_rows for seal in seals),
            "visual_rows": sum(seal.num_visual_rows for seal in seals),
            "bytes": num_bytes,
            "bytes_per_position": round(num_bytes / rows, 2) if rows else None,
            "manifest": cache.manifest.model_dump(mode="json"),
        }
    return 0, answer


def run_verify(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Problems, and the parts to dump again."""
    from dataclasses import asdict

    from common.cache.verify import verify

    report = verify(arguments.path, deep=not arguments.quick)
    answer = asdict(report) | {"bad_parts": report.bad_parts, "complete": report.complete, "ok": report.ok}
    answer["checked"] = "every byte" if report.deep else "names and sizes only, not the contents"
    if not report.ok:
        answer["next"] = "cascache repair, then the same teacher-dump command; or copy the cache again"
    elif not report.complete:
        answer["next"] = "run the same teacher-dump command to dump the missing parts"
    return int(not (report.ok and report.complete)), answer


def run_repair(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Unseal and clean; says what to dump again."""
    from common.cache.verify import repair, verify

    report = verify(arguments.path)
    parts = repair(report)
    return 0, {
        "path": arguments.path,
        "unsealed": report.bad_parts,
        "parts_to_dump": parts,
        "next": "run the same teacher-dump command",
    }


def run_finalize(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Write the index."""
    from common.cache.seals import read_manifest
    from common.cache.writer import CacheWriter

    writer = CacheWriter.open(arguments.path, read_manifest(arguments.path))
    writer.finalize()
    return 0, {"path": arguments.path, "parts": len(writer.sealed)}


def run_transfer(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Copy sealed parts; 1 when parts of the plan are still missing."""
    from dataclasses import asdict

    from common.cache.transfer import transfer

    done = transfer(arguments.sources, arguments.target)
    return int(bool(done.missing)), {"target": arguments.target} | asdict(done)


if __name__ == "__main__":
    sys.exit(main())
