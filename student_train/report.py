"""What runs did, as one self-contained HTML page: terms over steps, data wait, accuracy, runs side by side.

runs/x/metrics.jsonl ──> a line a metric, over steps       runs/x/eval.json ──> accuracy by kind
       summary.json  ──> steps, seconds, model             runs/x/run.json  ──> student, caches, seed
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from common.errors import ConfigError
from common.html import render_page
from student_train.metrics import Line, read_lines, read_stage_ends

MAX_RUNS: Final = 6
"""Runs on one page."""

COURSE: Final = {
    "loss": "loss: sum of the weighted terms",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "data_wait_share": "share of a step waited for data",
    "padding_share": "share of positions that is padding",
    "eval/accuracy": "accuracy on held-out questions",
}
"""Metrics drawn beside the terms, and what they are called."""

_WIDTH: Final = 320
_HEIGHT: Final = 120


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, read."""

    name: str
    """Its path as it was given, or the last part of it where that says enough."""
    lines: list[Line]
    """Metrics."""
    ends: list[tuple[str, list[str]]]
    """Stage → its last values, in the order of `end_names`."""
    end_names: list[str]
    """Which values."""
    summary: dict[str, Any]
    """summary.json; empty while the run goes on."""
    identity: dict[str, Any]
    """What makes it this run."""
    scores: dict[str, Any] | None
    """eval.json, if questions were answered."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric of all runs, in SVG units."""

    name: str
    """For people."""
    lines: tuple[str, ...]
    """SVG path of each run, broken where a stage lacks the metric; empty where all do."""
    stages: tuple[str, ...]
    """Where stages of the first run begin."""
    high: str
    """Value at the top; the bottom is 0."""
    last: str
    """Label at the right."""


def write_report(directories: Sequence[str], out: Path) -> Path:
    """Write the page.

    Args:
        directories: Run directories, at most `MAX_RUNS`.
        out: The HTML file.

    Returns:
        `out`.

    Raises:
        ConfigError: A directory holds no run, or there are too many.
    """
    if not 1 <= len(directories) <= MAX_RUNS:
        raise ConfigError(f"found {len(directories)} runs, wanted 1 to {MAX_RUNS}; leave some out")
    runs = [read_run(Path(directory)) for directory in directories]
    short = [Path(run.name).name for run in runs]
    if len(set(short)) == len(short):
        runs = [replace(run, name=name) for run, name in zip(runs, short, strict=True)]
    terms = sorted({name for run in runs for line in run.lines for name in line if name.startswith("raw/")})
    page = render_page(
        "run.html.j2",
        title="What the run did" if len(runs) == 1 else "What the runs did",
        runs=runs,
        facts=_facts(runs),
        accuracy=_accuracy(runs),
        terms=[chart(name, name.removeprefix("raw/"), runs) for name in terms],
        course=[
            chart(name, title, runs)
            for name, title in COURSE.items()
            if any(name in line for run in runs for line in run.lines)
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def read_run(directory: Path) -> Run:
    """Read what a run has written so far.

    Raises:
        ConfigError: There is no run.
    """
    record, metrics = directory / "run.json", directory / "metrics.jsonl"
    if not record.exists() or not metrics.exists():
        raise ConfigError(f"{directory} holds no run (run.json, metrics.jsonl); name what --out named")
    ends = read_stage_ends(metrics)
    names = sorted({name for values in ends.values() for name in values if name.startswith("raw/")})
    return Run(
        name=str(directory),
        lines=read_lines(metrics),
        ends=[(stage, [_number(values.get(name)) for name in names]) for stage, values in ends.items()],
        end_names=[name.removeprefix("raw/") for name in names],
        summary=_read(directory / "summary.json") or {},
        identity=_read(record)["identity"],
        scores=_read(directory / "eval.json"),
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def chart(metric: str, title: str, runs: Sequence[Run]) -> Chart:
    """Draw a metric of every run over its steps.

    Args:
        metric: Its name in metrics.jsonl.
        title: For people.
        runs: One line each.
    """
    values = [float(line[metric]) for run in runs for line in run.lines if metric in line]
    last = max((float(line["total_step"]) for run in runs for line in run.lines), default=1.0)
    high = max([*values, 0.0])
    across, up = _WIDTH / max(last - 1, 1), _HEIGHT / (high or 1)
    paths = tuple(_path(run.lines, metric, across, up) for run in runs)
    return Chart(title, paths, _stage_starts(runs[0], across), _number(high), f"step {last:.0f}")


def _path(lines: Sequence[Line], metric: str, across: float, up: float) -> str:
    pieces, drawn = [], None
    for line in lines:
        stage = (line["level"], line["stage"])
        if metric in line:
            pen = "L" if drawn == stage else "M"
            left, top = across * (float(line["total_step"]) - 1), _HEIGHT - up * max(float(line[metric]), 0.0)
            pieces.append(f"{pen}{left:.1f},{top:.1f}")
            drawn = stage
    return " ".join(pieces)


def _stage_starts(run: Run, across: float) -> tuple[str, ...]:
    """The first step logged of each stage but the first."""
    places, before = [], None
    for line in run.lines:
        stage = (line["level"], line["stage"])
        if before not in (None, stage):
            places.append(f"{across * (float(line['total_step']) - float(line['step'])):.1f}")
        before = stage
    return tuple(places)


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    def each(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
        return name, ["–" if value is None else str(value) for value in values]

    return [
        each("student", [run.identity.get("student") for run in runs]),
        each("levels", [len(run.identity.get("caches", {})) for run in runs]),
        each("seed", [run.identity.get("seed") for run in runs]),
        each("steps", [_steps(run) for run in runs]),
        each("milliseconds per step, median", [_step_milliseconds(run) for run in runs]),
        each("model", [run.summary.get("model") for run in runs]),
    ]


def _steps(run: Run) -> str:
    total = sum(stage.get("steps") or 0 for stage in run.identity.get("stages", ()))
    done = run.lines[-1]["total_step"] if run.lines else 0
    return f"{done} of {total}"


def _step_milliseconds(run: Run) -> str | None:
    seconds = [float(line["step_seconds"]) for line in run.lines if "step_seconds" in line]
    return f"{1000 * median(seconds):.0f}" if seconds else None


def _accuracy(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    if not any(run.scores for run in runs):
        return []
    kinds = sorted({kind for run in runs for kind in (run.scores or {}).get("kinds", ())})
    scores = [run.scores or {"accuracy": None, "kinds": {}} for run in runs]
    rows = {"mean over kinds": [each["accuracy"] for each in scores]}
    rows |= {kind: [each["kinds"].get(kind) for each in scores] for kind in kinds}
    return [(name, _cells(values)) for name, values in rows.items()]


def _cells(values: Sequence[float | None]) -> list[dict[str, Any]]:
    best = max((value for value in values if value is not None), default=None)
    return [
        {
            "text": "–" if value is None else f"{100 * value:.1f}",
            "best": value is not None and value == best and len(values) > 1,
        }
        for value in values
    ]


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.4g}"
