"""The `cascache` command: inspect, verify, repair and share caches.

exit code   0 all is well · 1 problems, or parts are missing · 2 the command could not be carried out
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from common.cache import cli_inspect, cli_look, cli_size, cli_transfer, cli_trust
from common.cache.commands import EPILOG
from common.console import escape_unprintable
from common.doctor import cli as doctor
from common.errors import CascacheError, tell_os_error
from common.extras import tell_missing_module
from common.home import expand_homes

GROUPS = (cli_inspect, cli_look, cli_size, cli_transfer, cli_trust, doctor)
"""Modules that register commands, in the order that `--help` lists them."""


def build_parser() -> argparse.ArgumentParser:
    """Every sub-command and flag."""
    parser = argparse.ArgumentParser(
        prog="cascache", description="Inspect, verify, repair and share caches.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    escape_unprintable()
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == [doctor.NAME]:
        return doctor.main(given[1:])
    arguments = argparse.Namespace(**expand_homes(vars(build_parser().parse_args(given))))
    try:
        code, answer = arguments.run(arguments)
    except CascacheError as error:
        print(f"cascache: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cascache: error: {tell_os_error(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        line = tell_missing_module(error)
        if line is None:
            raise
        print(f"cascache: error: {line}", file=sys.stderr)
        return 2
    text = json.dumps(answer, indent=1) if arguments.json else arguments.render(answer)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
