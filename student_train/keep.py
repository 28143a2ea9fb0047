"""What a run keeps beside its last weights: the best student so far, and an average of the weights.

    every --eval-steps   held-out questions ──> accuracy ──better──> model-best/ (with its eval.json)
    every step           average ← decay · average + (1 − decay) · weight      ──end──> model-ema/

Both are functions of the weights alone, so a resumed run repeats them.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_train.card import model_card
from student_train.checkpoint import put_weights
from student_train.evaluate import Team, answer
from student_train.metrics import write_json
from student_train.model import Student, save_student
from student_train.plan import Plan, load_own_processor


class BestKeeper:
    """Answers held-out questions now and then, and keeps the student that did best."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """Find what an earlier run of the same settings kept.

        Args:
            plan: Its held-out samples are the questions.
            directory: `model-best`.
        """
        self._plan = plan
        self._directory = directory
        self._former = directory.with_name(f".{directory.name}.former")
        if self._former.exists() and not directory.exists():
            self._former.replace(directory)
        # Not the stream's: its threads use that one at the same time.
        self._processor = load_own_processor(plan.student, plan.config, plan.levels)

    @property
    def best(self) -> dict[str, Any] | None:
        """Scores and `step` of the best student so far; None before the first look."""
        path = self._directory / "eval.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def look(self, student: Student, step: int, team: Team) -> dict[str, float]:
        """Examine the student; the first process keeps it if none was better.

        Args:
            student: Whole, in this process.
            step: Optimiser steps so far, over all stages.
            team: The processes that share the questions.

        Returns:
            `eval/accuracy` and `eval/<kind>`, to log.
        """
        config, source = self._plan.config, self._plan.held_out
        assert source is not None
        student.eval()
        scores, _ = answer(student.model, self._processor, source, limit=config.eval_limit, team=team)
        student.train()
        best = self.best if team.rank == 0 else scores
        if best is None or scores["accuracy"] > best["accuracy"]:
            self._keep(student, {**scores, "step": step})
        kinds = {f"eval/{kind}": value for kind, value in scores["kinds"].items()}
        return {"eval/accuracy": scores["accuracy"], **kinds}

    def _keep(self, student: Student, scores: Mapping[str, Any]) -> None:
        """Swap the new best in: at every moment the old or the new one is there, whole."""
        fresh = self._directory.with_name(f".{self._directory.name}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        save_copy(student, self._plan, self._processor, fresh)
        write_json(fresh / "eval.json", scores)
        if self._directory.exists():
            shutil.rmtree(self._former, ignore_errors=True)
            self._directory.replace(self._former)
        fresh.replace(self._directory)
        shutil.rmtree(self._former, ignore_errors=True)


class WeightAverage:
    """Exponential moving average of every weight that has trained so far."""

    def __init__(self, decay: float) -> None:
        """Start empty.

        Args:
            decay: Share of the average that a step keeps.
        """
        self._decay = decay
        self.values: dict[str, Tensor] = {}

    def start(self, student: Student) -> None:
        """Take in weights that begin to train, at their present value."""
        for name, value in student.named_parameters():
            if value.requires_grad and student.part_of(name) != "balance":
                self.values.setdefault(name, value.detach().clone())

    @torch.no_grad()
    def update(self, student: Student) -> None:
        """Move every average a step towards its weight."""
        weights = dict(student.named_parameters())
        for name, value in self.values.items():
            value.lerp_(weights[name].detach(), 1 - self._decay)


def save_copy(
    student: Student,
    plan: Plan,
    processor: Any,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write a student that goes on training afterwards as a plain model directory.

    Args:
        student: Left as it is.
        plan: For the model card.
        processor: The processor to save with it.
        directory: Where to; must not exist.
        weights: Weights to save instead of its own, by name.
        results: Metrics for the card.
    """
    if student.has_adapters or weights:
        student = copy.deepcopy(student)
        put_weights(student, weights or {})
        student.merge_adapters()
    save_student(student, processor, directory, card=model_card(plan, dict(results or {})))
