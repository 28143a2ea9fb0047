"""The `student-train` command: parse, check, hand over.

student-train --cache ./zarr/l1 [--cache ./zarr/l2] ...     train down the cascade
student-train eval --model runs/x/model --data held.json    answer held-out questions
student-train report runs/x [runs/y ...]                    a page about runs
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.console import escape_unprintable
from common.errors import CascacheError, tell_os_error
from common.extras import tell_missing_module
from common.home import expand_homes
from common.settings import load_settings
from student_train.config import EvalConfig, TrainConfig

_EPILOG = """examples:
  student-train --cache ./zarr/l1
  student-train --cache ./zarr/l1 --cache ./zarr/l2 --student tiny-student --out runs/x --eval held_out.json
  student-train --cache ./zarr/l1 --recipe pt-sft-sft --dry-run
  student-train eval --model runs/x/model --data held_out.json
  student-train report runs/x runs/y --out report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after an error that says what to do."""
    escape_unprintable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["eval"]:
            return _evaluate(arguments[1:])
        if arguments[:1] == ["report"]:
            return _write_page(arguments[1:])
        return _train(arguments)
    except CascacheError as error:
        print(f"student-train: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"student-train: error: {tell_os_error(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        line = tell_missing_module(error)
        if line is None:
            raise
        print(f"student-train: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = str(stop) or "the last checkpoint stands"
        print(f"student-train: interrupted, {said}; the same command resumes from there", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    config = load_settings(TrainConfig, arguments, prog="student-train", epilog=_EPILOG)
    from student_train.plan import make_plan
    from student_train.rundir import RunDirectory

    plan = make_plan(config)
    if config.dry_run:
        if not config.restart:
            RunDirectory(plan.out, plan.identity()).check()
        print(json.dumps(plan.to_json(), indent=2) if config.json_summary else plan.describe())
        return 0
    if os.environ.get("RANK", "0") == "0":
        for line in (plan.choices(), *(f"note: {note}" for note in plan.notes)):
            print(f"student-train: {line}", file=sys.stderr)
    from student_train.train import train

    summary = train(config, plan)
    if summary["is_main"]:
        print(json.dumps(summary, indent=2) if config.json_summary else _report(summary))
    return 0


def _evaluate(arguments: list[str]) -> int:
    config = load_settings(EvalConfig, arguments, prog="student-train eval", section="student-train-eval")
    from student_train.evaluate import run_evaluation

    scores = run_evaluation(config)
    print(json.dumps(scores, indent=2) if config.json_summary else _table(scores))
    return 0


def _write_page(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="student-train report", description="Write one HTML page about runs, side by side."
    )
    parser.add_argument("runs", nargs="+", help="run directories, as --out named them")
    parser.add_argument("--out", help="the page; default: report.html in the first run's directory")
    chosen = argparse.Namespace(**expand_homes(vars(parser.parse_args(arguments))))
    from student_train.report import write_report

    out = write_report(chosen.runs, Path(chosen.out or Path(chosen.runs[0]) / "report.html"))
    print(f"page: {out}")
    return 0


def _report(summary: dict[str, Any]) -> str:
    lines = []
    for name, values in summary["stages"].items():
        terms = ", ".join(f"{key[4:]} {value:.4f}" for key, value in values.items() if key.startswith("raw/"))
        lines.append(f"{name}: {terms}")
    if not summary["finished"]:
        lines.append(
            f"stopped at step {summary['steps']} of {summary['total_steps']}; "
            f"run again without --max-steps to continue"
        )
    else:
        lines.append(f"model: {summary['model']} ({summary['steps']} steps, {summary['seconds']:.0f} s)")
    if summary.get("eval"):
        lines.append(_table(summary["eval"]))
    return "\n".join(lines)


def _table(scores: dict[str, Any]) -> str:
    rows = [
        f"  {kind:16} {share:6.1%}  ({scores['num_kinds'][kind]})" for kind, share in scores["kinds"].items()
    ]
    skipped = f", {scores['skipped']} left out as unreadable" if scores["skipped"] else ""
    head = f"exact match {scores['accuracy']:.1%} (mean over kinds, {scores['num']} questions{skipped})"
    return "\n".join([head, *rows])
