"""`cascache ls · merge · push · pull`: list levels, and copy parts from one place to another."""

import argparse
import sys
from typing import Any

from common.cache.commands import Answer, add_command

_EXAMPLES = (
    "places: a directory, s3://bucket/l1, gs://, az://, https://, or hf://datasets/owner/name/l1. "
    "If it is interrupted, the same command resumes."
)


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    text = "levels in a directory or below a prefix: how much of each is there"
    listing = add_command(subparsers, "ls", text, run_ls, render=render_ls)
    listing.add_argument("place", help="directory or URL of levels, or of one cache")
    text = "copy the sealed parts of caches of one identity into another"
    merge = add_command(subparsers, "merge", text, run_transfer)
    merge.add_argument("target", help="directory or URL to copy to; created when it does not exist")
    merge.add_argument("sources", nargs="+", help="directories or URLs to copy from")
    _add_subset(merge)
    for name, text in {
        "push": "copy a cache to an object store, or any other place",
        "pull": "copy a cache from an object store, or any other place",
    }.items():
        command = add_command(subparsers, name, text, run_transfer)
        command.description = f"{text}; {_EXAMPLES}"
        command.add_argument("sources", nargs=1, metavar="source", help="directory or URL to copy from")
        command.add_argument("target", help="directory or URL to copy to")
        command.add_argument(
            "--level",
            action="append",
            metavar="NAME",
            help="source and target are places of levels; copy this one (may be given several times)",
        )
        _add_subset(command)


def _add_subset(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--samples",
        metavar="first:N",
        help="only the whole parts that hold the first N samples of the plan: up to a part's samples more. "
        "Seals stay as they are; the copy is a valid cache with parts missing, and grows when more is pulled",
    )
    command.add_argument(
        "--arrays",
        metavar="NAMES",
        help="only these: topk (response rows, always), visual (rows at image positions), relation, hidden, "
        "images. Parts get new seals that name the old ones; the copy fits no cache with other arrays",
    )
    command.add_argument(
        "--strip-images", action="store_true", help="all but the image files; ids and hashes stay"
    )
    command.add_argument(
        "--strip-text",
        action="store_true",
        help="all but the token ids of the text; hashes stay, and a student re-tokenises them from --data. "
        "Response rows stay too, and their likeliest ids are close to the text",
    )
    command.add_argument("--jobs", type=int, default=16, metavar="N", help="files copied side by side")


def run_ls(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Levels of a place; 1 when one of them is not complete."""
    from dataclasses import asdict

    from common.cache.levels import list_levels

    levels = [asdict(level) for level in list_levels(arguments.place)]
    return int(not all(level["complete"] for level in levels)), {
        "place": arguments.place,
        "levels": levels,
    }


def render_ls(answer: Answer) -> str:
    """One line a level."""
    lines = [
        f"{'level':12} {'teacher':20} {'parts':14} {'samples':>9} {'positions':>12} {'bytes':>15}  arrays"
    ]
    for level in answer["levels"]:
        parts = level["parts"] if level["complete"] else f"{level['parts']} (partial)"
        numbers = f"{level['samples']:>9,} {level['positions']:>12,} {level['bytes']:>15,}"
        lines.append(
            f"{level['name']:12} {level['teacher']:20} {parts:14} {numbers}  {','.join(level['arrays'])}"
        )
    return "\n".join(lines)


def run_transfer(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Copy sealed parts; 1 when parts that were asked for are nowhere yet."""
    from common.cache.subset import GROUPS, parse_arrays, parse_samples

    keep = parse_arrays(arguments.arrays) if arguments.arrays else frozenset(GROUPS)
    if arguments.strip_images:
        keep -= {"images"}
    if arguments.strip_text:
        keep -= {"text"}
    settings = {
        "num_samples": parse_samples(arguments.samples) if arguments.samples else None,
        "keep": keep,
        "jobs": max(1, arguments.jobs),
        "progress": not arguments.json and sys.stderr.isatty(),
    }
    levels = getattr(arguments, "level", None)
    if not levels:
        return _transfer(arguments.sources, arguments.target, settings)
    done = {
        name: _transfer([_below(arguments.sources[0], name)], _below(arguments.target, name), settings)
        for name in levels
    }
    return max(code for code, _ in done.values()), {name: answer for name, (_, answer) in done.items()}


def _below(place: str, name: str) -> str:
    return f"{place.rstrip('/')}/{name}"


def _transfer(sources: list[str], target: str, settings: dict[str, Any]) -> tuple[int, Answer]:
    from dataclasses import asdict

    from common.cache.transfer import transfer

    done = transfer(sources, target, **settings)
    held = len(done.kept) + len(done.copied)
    answer = {"target": target} | asdict(done) | {"complete": held == done.num_parts}
    if done.missing:
        answer["next"] = "the dump is not finished: run the same command again when it is"
    return int(bool(done.missing)), answer
