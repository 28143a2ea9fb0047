"""One run directory: whose it is, and what lies where.

runs/x/
  run.json        identity of the run: another one is refused, field by field
  checkpoints/    while it runs
  metrics.jsonl   tensorboard/
  model/          the finished student; it exists only whole
  model-best/     the best student so far, with --eval-steps
  model-ema/      the averaged weights, with --ema
  eval.json       answers.jsonl
  summary.json
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import TrainingError
from student_train.metrics import write_json
from student_train.recipe import recipe_differences

_MADE_BY_A_RUN = (
    *("checkpoints", "model", "model-best", "model-ema", ".model-best.former", "tensorboard"),
    *("run.json", "summary.json", "metrics.jsonl", "eval.json", "answers.jsonl", "profile.json"),
)


class RunDirectory:
    """Paths of a run, and the check that it is ours."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Name the directory; nothing is touched yet.

        Args:
            path: `runs/x`.
            identity: What must be equal for a run to go on, as JSON.
        """
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.model = path / "model"
        self.best_model = path / "model-best"
        self.average_model = path / "model-ema"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self._record = path / "run.json"

    def claim(self, *, restart: bool, notes: tuple[str, ...] = ()) -> None:
        """Make the directory this run's; one process calls it.

        Args:
            restart: Delete what an earlier run made here.
            notes: Written into run.json.

        Raises:
            TrainingError: It holds a run with other settings; lists the differences.
        """
        if restart:
            for name in _MADE_BY_A_RUN:
                shutil.rmtree(self.path / name, ignore_errors=True)
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        for torn in self.path.glob(".*.tmp*"):
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        self.check()
        if not self._record.exists():
            write_json(self._record, {"identity": self.identity, "notes": notes})

    def check(self) -> None:
        """Refuse a directory that holds another run; touches nothing.

        Raises:
            TrainingError: It holds a run with other settings; lists the differences.
        """
        if self._record.exists():
            found = json.loads(self._record.read_text(encoding="utf-8"))["identity"]
            refuse_other(self.path, found, self.identity)

    @property
    def finished(self) -> bool:
        """Whether the model has been saved."""
        return (self.model / "config.json").exists()


def refuse_other(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on from a run with other settings.

    Raises:
        TrainingError: Lists the differences, and what to do.
    """
    differences = recipe_differences(found, wanted)
    if differences:
        listing = "\n  ".join(differences)
        raise TrainingError(
            f"{where} was made with other settings (found -> wanted):\n  {listing}\n"
            f"give those settings, choose another --out, or start again with --restart"
        )
