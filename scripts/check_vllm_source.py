"""Check what the capture uses of vLLM against the source of a release that is not installed.

    pip download --no-deps vllm==0.33.0 --dest wheels
    python -m scripts.check_vllm_source wheels/vllm-0.33.0-*.whl [site-packages …]

Wheels are read as archives; nothing is imported or run. Exit status 1 when something is missing.
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import DataError
from common.tested_versions import vllm_standing
from scripts.vllm_seams import EXPECTED, UNCHECKED, Absent, Call, Expected, Member, Text
from scripts.vllm_source import CallSite, Source, open_source
from scripts.vllm_uses import Uses, find_uses

_SHARED = ("torch", "torchvision", "transformers", "numpy", "pillow", "pydantic")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One expectation beside what the source has."""

    where: str
    """File and class below `vllm/`."""
    name: str
    """What is looked for there."""
    kind: str
    """`member`, `call`, `text` or `absent`."""
    found: str
    """`file.py:line`, or empty."""
    problem: str
    """What is wrong; empty when nothing is."""
    used: tuple[str, ...]
    """Lines of teacher_dump that use the name."""
    why: str
    """What for."""


def check(source: Source, expected: Sequence[Expected] = EXPECTED, uses: Uses | None = None) -> list[Verdict]:
    """Check every expectation against a source.

    Args:
        source: From `open_source`.
        expected: What to look for.
        uses: Lines that use each name; None: found in this tree.
    """
    places = find_uses() if uses is None else uses
    verdicts = []
    for each in expected:
        found, problem = _look(source, each)
        used = tuple(places.get(each.name, ()))
        kind = type(each).__name__.lower()
        verdicts.append(Verdict(each.where, each.name, kind, found, problem, used, each.why))
    return verdicts


def _look(source: Source, wanted: Expected) -> tuple[str, str]:
    """Where it is, and what is wrong with it."""
    file, _, owner = wanted.where.partition(":")
    if source.find(wanted.where) is None:
        others = source.elsewhere(owner.split(".")[-1]) if owner else []
        hint = f"; something of that name is in {', '.join(others[:3])}" if others else ""
        return "", f"no {owner or 'such file'} in {file}{hint}"
    if isinstance(wanted, Text):
        line = source.strings(file).get(wanted.name)
        return (f"{file}:{line}", "") if line else ("", f"no {wanted.name!r} in {file}")
    if isinstance(wanted, Call):
        return _look_call(source, wanted, file)
    found = source.find(f"{wanted.where}{'.' if owner else ':'}{wanted.name}")
    if isinstance(wanted, Absent):
        return "", f"{owner} has {wanted.name} now" if found else ""
    if found is None:
        return "", f"no {wanted.name} in {owner or file}"
    node, home = found
    return f"{home}:{getattr(node, 'lineno', 0)}", _wrong_parameters(node, wanted)


def _wrong_parameters(node: ast.AST, wanted: Member) -> str:
    if not wanted.takes and not wanted.keywords:
        return ""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{wanted.name} is no function now"
    given = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg != "self"]
    if tuple(given[: len(wanted.takes)]) != wanted.takes:
        return f"{wanted.name} takes ({', '.join(given)}), wanted ({', '.join(wanted.takes)}, …)"
    named = {*given, *(each.arg for each in node.args.kwonlyargs)}
    lost = [each for each in wanted.keywords if each not in named and node.args.kwarg is None]
    return f"{wanted.name} takes no {', '.join(lost)}" if lost else ""


def _look_call(source: Source, wanted: Call, file: str) -> tuple[str, str]:
    calls = source.calls(wanted.where, wanted.name)
    if not calls:
        return "", f"{wanted.where.partition(':')[2]} does not call {wanted.name}"
    fitting = [each for each in calls if each.arguments[: len(wanted.takes)] == wanted.takes]
    if not fitting:
        return f"{file}:{calls[0].line}", _wrong_arguments(calls, wanted)
    steady = [each for each in fitting if each.always]
    line = (steady or fitting)[0].line
    return f"{file}:{line}", "" if steady else f"{wanted.name} is called under a condition now"


def _wrong_arguments(calls: list[CallSite], wanted: Call) -> str:
    found = "; ".join(", ".join(each.arguments) for each in calls)
    return f"{wanted.name} is called with ({found}), wanted ({', '.join(wanted.takes)}, …)"


def to_report(source: Source, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What `--json` writes of one source."""
    missing = [each for each in verdicts if each.problem]
    return {
        "vllm": source.release,
        "standing": vllm_standing(source.release),
        "holds": not missing,
        "checked": len(verdicts),
        "missing": [asdict(each) for each in missing],
        "wants": {name: source.wants[name] for name in _SHARED if name in source.wants},
        "unchecked": UNCHECKED,
        "table": [asdict(each) for each in verdicts],
    }


def print_table(source: Source, verdicts: Sequence[Verdict]) -> None:
    """The same as a table: what is missing comes last, where a terminal shows it."""
    width = max(len(each.name) for each in verdicts)
    for each in sorted(verdicts, key=lambda each: bool(each.problem)):
        used = ", ".join(each.used[:2]) + (" …" if len(each.used) > 2 else "")
        state = f"MISSING  {each.problem}" if each.problem else each.found or f"absent from {each.where}"
        print(f"{each.name:<{width}}  {used or '-':<34}  {state}")
    missing = sum(bool(each.problem) for each in verdicts)
    wants = ", ".join(f"{name} {source.wants[name] or 'any'}" for name in _SHARED if name in source.wants)
    print(
        f"vllm {source.release} ({vllm_standing(source.release)}): {len(verdicts)} checked, {missing} missing"
    )
    print(f"it asks for: {wants}")
    print(f"not checked: {UNCHECKED}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every source that is named; 1 when one of them lacks something."""
    parser = argparse.ArgumentParser(prog="check_vllm_source", description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="+", help="a wheel, or a directory with vllm in it")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    options = parser.parse_args(arguments)
    uses = find_uses()
    try:
        checked = [(each, check(each, uses=uses)) for each in map(open_source, options.source)]
    except DataError as error:
        print(f"DataError: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([to_report(*each) for each in checked], indent=1))
    else:
        for each in checked:
            print_table(*each)
    return int(any(verdict.problem for _, verdicts in checked for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
