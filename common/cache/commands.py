"""What every group of `cascache` commands is made of; nothing heavy is imported before a command runs.

A group is a module `cli_<group>.py` with one function `add_commands(subparsers)`; `cli.py` lists the groups.
A command answers with its exit code and one JSON object.
"""

import argparse
from collections.abc import Callable
from typing import Any, Final

from common.cache.terminal import plain

Answer = dict[str, Any]
Run = Callable[[argparse.Namespace], tuple[int, Answer]]

EPILOG: Final = (
    "exit codes: 0 all is well; 1 problems were found, or parts are missing; "
    "2 the command could not be carried out"
)


def to_text(answer: Answer, indent: str = "") -> str:
    """One line a field; what is nested stands below it, indented."""
    lines = []
    for name, value in answer.items():
        title = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict) and value:
            lines += [title, to_text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [title] + [
                f"{indent}  " + "  ".join(plain(str(v)) for v in entry.values()) for entry in value
            ]
        else:
            lines.append(f"{title} {plain(str(value))}")
    return "\n".join(lines)


def add_command(
    subparsers: Any, name: str, text: str, run: Run, *, render: Callable[[Answer], str] = to_text
) -> argparse.ArgumentParser:
    """One sub-command with the flag `--json`.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
        name: What a person types.
        text: Its one line of help.
        run: Carries it out: parsed arguments → exit code and answer.
        render: Answer → text for people.

    Returns:
        The parser to add arguments to.
    """
    command: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text, epilog=EPILOG)
    command.add_argument("--json", action="store_true", help="one JSON object instead of text")
    command.set_defaults(run=run, render=render)
    return command
