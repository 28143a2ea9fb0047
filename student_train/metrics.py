"""What a run reports: one JSON line every few steps, TensorBoard through accelerate, a progress bar.

A line holds, averaged over its steps: every term `raw/…` and `weighted/…`, `loss`, `learning_rate`,
`grad_norm`, `tokens_per_second`, `data_wait_share` (time waited for data ÷ time of the step).
On resuming, lines past the checkpoint are dropped, so the file tells each step once.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, float | int | str]

LOG_SECONDS = 15.0
"""Seconds between two lines of progress where stderr is no terminal."""


class Metrics:
    """Collects a step's values, writes their averages."""

    def __init__(self, path: Path | None, *, log_steps: int, accelerator: Any = None) -> None:
        """Open the log.

        Args:
            path: The JSONL file; None in processes that do not write.
            log_steps: Steps that one line averages over.
            accelerator: Its trackers get every line too.
        """
        self._path = path
        self._log_steps = log_steps
        self._accelerator = accelerator
        self._sums: dict[str, float] = {}
        self._nums: dict[str, int] = {}
        self.last: Line = {}

    def resume(self, total_steps: int) -> None:
        """Forget lines past a step, left by a run that was killed after its last checkpoint."""
        if self._path is None or not self._path.exists():
            return
        kept = [line for line in read_lines(self._path) if int(line["total_step"]) <= total_steps]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)

    def add(self, values: Mapping[str, float], *, where: Line) -> None:
        """Count one step in; write a line when it is time.

        Args:
            values: Numbers to average, each over the steps that have it.
            where: `level`, `stage`, `step`, `total_step` of this step.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._nums[name] = self._nums.get(name, 0) + 1
        if int(where["total_step"]) % self._log_steps == 0:
            self.flush(where)

    def flush(self, where: Line) -> None:
        """Write what has been collected, if anything."""
        if not self._nums:
            return
        means = {name: value / self._nums[name] for name, value in self._sums.items()}
        self._sums, self._nums = {}, {}
        self.last = {**where, **means}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.last) + "\n")
        if self._accelerator is not None:
            self._accelerator.log(means, step=int(where["total_step"]))


def progress_bar(total: int, *, done: int, shown: bool) -> Any:
    """Return tqdm's bar of a run: live on a terminal, a line every 15 seconds in a log.

    Args:
        total: Steps of the run.
        done: Steps taken before.
        shown: Whether this process shows it.
    """
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit="step",
        disable=not shown,
        mininterval=0.1 if live else LOG_SECONDS,
        maxinterval=10.0 if live else LOG_SECONDS,
        ncols=None if live else 100,
        bar_format=None
        if live
        else "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
    )


def read_stage_ends(path: Path) -> dict[str, Line]:
    """Return the last line of every level and stage, as `l1/dft` -> line.

    Args:
        path: The JSONL file; it may be missing.
    """
    lines = read_lines(path) if path.exists() else []
    return {f"l{line['level']}/{line['stage']}": line for line in lines}


def read_lines(path: Path) -> list[Line]:
    """Read the whole lines of a JSONL file; a torn last one, left by a kill, is dropped.

    Args:
        path: The file.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
