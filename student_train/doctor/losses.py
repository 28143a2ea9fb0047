"""Whether the fused losses equal the eager ones on this machine, in training's arithmetic.

    hidden states of a real batch ──┬─ fused  (training's arithmetic)
                                    ├─ eager  (the same arithmetic: the definition)
                                    └─ eager  (float64: the truth)

The fused path's error may be twice the eager one's, and rounding of float32 is always
allowed. A few hundred rows are compared: the definition holds all their logits.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.doctor.check import Check, Finding
from student_train.batch import Batch, SparseTargets
from student_train.losses.objective import Objective
from student_train.losses.rows import Head
from student_train.losses.terms import RelationTerm
from student_train.step import StageTrainer
from student_train.stream import StepInput
from student_train.train import Run

_ROWS = 128
_IMAGES = 2
_FLOOR = 2e-5
"""Relative difference that two orders of summation may make in float32."""
_ALLOWED = 2.0


class Gradients(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    """A scalar."""
    hidden: Tensor
    """[B, T, D] gradient at the hidden states."""
    head: Tensor
    """[V, D] gradient at the head."""


def check_losses(run: Run, trainer: StageTrainer, inputs: StepInput) -> Check:
    """Compare loss and gradients of both implementations on one batch.

    Args:
        run: The student, its device and its arithmetic.
        trainer: Its stage.
        inputs: A step's batches.
    """
    student, accelerator = trainer.student, run.accelerator
    batch = _few_rows(inputs.batches[0].to(accelerator.device))
    with torch.no_grad(), accelerator.autocast():
        hidden = student.hidden(batch.inputs).detach()
    vocabulary = run.vocab_size(trainer.planned)
    head = Head(student.head_weight.detach(), _detached(student.head_bias), vocabulary)
    relation = run.plan.levels[0].manifest.relation
    term = RelationTerm(of=relation.of, norm=relation.norm)

    def gradients(implementation: Any, *, exact: bool) -> Gradients:
        objective = Objective(
            trainer.planned.stage.terms,
            divergence=trainer.planned.stage.divergence,
            relation=term,
            implementation=implementation,
        )
        return _gradients(objective, hidden, head, batch, nullcontext() if exact else accelerator.autocast())

    truth = _gradients_in_float64(trainer, term, hidden, head, batch)
    fused, eager = (gradients(name, exact=False) for name in ("fused", "eager"))
    apart = {
        "fused_from_float64": _distances(fused, truth),
        "eager_from_float64": _distances(eager, truth),
        "fused_from_eager": _distances(fused, eager),
    }
    return judge(apart, loss=float(fused.loss), batch=batch, precision=run.plan.config.precision)


def _gradients(objective: Objective, hidden: Tensor, head: Head, batch: Batch, arithmetic: Any) -> Gradients:
    states, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    with arithmetic:
        loss = objective(states, Head(weight, head.bias, head.vocab_size), batch).loss
    at_states, at_weight = torch.autograd.grad(loss, [states, weight], allow_unused=True)
    return Gradients(loss.detach(), _or_zero(at_states, states), _or_zero(at_weight, weight))


def _gradients_in_float64(
    trainer: StageTrainer, term: RelationTerm, hidden: Tensor, head: Head, batch: Batch
) -> Gradients:
    stage = trainer.planned.stage
    objective = Objective(stage.terms, divergence=stage.divergence, relation=term, implementation="eager")
    bias = None if head.bias is None else head.bias.cpu().double()
    wide = Head(head.weight.cpu().double(), bias, head.vocab_size)
    here = batch.to(torch.device("cpu"))  # a large head in float64 may not fit beside the student
    return _gradients(objective, hidden.cpu().double(), wide, here, nullcontext())


def _few_rows(batch: Batch) -> Batch:
    """The batch with the targets of its first rows of each kind."""

    def few(targets: SparseTargets | None) -> SparseTargets | None:
        return None if targets is None else targets.map(lambda values: values[:_ROWS])

    return replace(
        batch,
        response_rows=batch.response_rows[:_ROWS],
        response_labels=batch.response_labels[:_ROWS],
        response_targets=few(batch.response_targets),
        visual_rows=batch.visual_rows[:_ROWS],
        visual_targets=few(batch.visual_targets),
        relations=batch.relations[:_IMAGES],
        visual_weights=None if batch.visual_weights is None else batch.visual_weights[:_ROWS],
    )


def _distances(found: Gradients, truth: Gradients) -> dict[str, float]:
    """Relative differences: of the loss, and of each gradient's largest entry."""

    def far(one: Tensor, other: Tensor) -> float:
        exact = other.cpu().double()
        return float((one.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))

    pairs = zip(Gradients._fields, found, truth, strict=True)
    return {name: far(one, other) for name, one, other in pairs}


def judge(apart: dict[str, dict[str, float]], *, loss: float, batch: Batch, precision: str) -> Check:
    """Distances of the two implementations against what rounding allows.

    Args:
        apart: Relative distances of loss and gradients: `fused_from_float64`, `eager_from_float64`,
            `fused_from_eager`.
        loss: Of the fused one.
        batch: What was compared.
        precision: Training's arithmetic.
    """
    fused, eager = apart["fused_from_float64"], apart["eager_from_float64"]
    limits = {name: max(_FLOOR, _ALLOWED * each) for name, each in eager.items()}
    rows = len(batch.response_rows) + len(batch.visual_rows)
    values = {"rows": rows, "images": len(batch.relations), "precision": precision, "loss": loss}
    said = (
        f"over {rows} rows ({precision}): fused from eager {_told(apart['fused_from_eager'])}; from float64 "
        f"fused {_told(fused)}, eager {_told(eager)}; relative"
    )
    wanted = f"no farther from float64 than {_ALLOWED:g} × the eager ones, or {_FLOOR:g}"
    finding = Finding("losses", said, wanted, values | apart | {"limits": limits})
    if not all(fused[name] <= limit for name, limit in limits.items()):  # NaN too
        return finding.fails(
            "do not train: report it with --json; --precision fp32 shows whether the arithmetic is the cause"
        )
    return finding.passes()


def _told(distances: dict[str, float]) -> str:
    return f"{distances['loss']:.1e} (gradients {max(distances['hidden'], distances['head']):.1e})"


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
