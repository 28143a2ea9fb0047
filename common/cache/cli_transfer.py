"""`cascache merge · push · pull`: sealed parts from one place to another."""

import argparse
from typing import Any

from common.cache.commands import Answer, add_command


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    text = "copy the sealed parts of caches of one identity into another"
    merge = add_command(subparsers, "merge", text, run_transfer)
    merge.add_argument("target", help="directory or URL to copy to; created when it does not exist")
    merge.add_argument("sources", nargs="+", help="directories or URLs to copy from")
    for name, text in {
        "push": "copy a cache to an object store, or any other place",
        "pull": "copy a cache from an object store, or any other place",
    }.items():
        command = add_command(subparsers, name, text, run_transfer)
        command.add_argument("sources", nargs=1, metavar="source", help="directory or URL to copy from")
        command.add_argument("target", help="directory or URL to copy to")


def run_transfer(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Copy sealed parts; 1 when parts of the plan are still missing."""
    from dataclasses import asdict

    from common.cache.transfer import transfer

    done = transfer(arguments.sources, arguments.target)
    return int(bool(done.missing)), {"target": arguments.target} | asdict(done)
