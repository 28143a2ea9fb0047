"""Cross-entropy and sparse divergence of all rows in one walk over the head; no [N, V] tensor, ever.

Axes: N rows, D width, V real vocabulary; n rows and v vocabulary entries at a time.

    by rows         for n rows: logits [n, V], losses, dL/dz in place, pulled through the head at once.
                    Three matrix products a row (two under a frozen head), like the naive loss.
    by vocabulary   forward: streaming softmax over [N, v]; backward: the logits again, then dL/dz.
                    Four products (three), the least memory, and no gradient held in between.

Both equal `eager.head_losses`. Values and gradients are linear in the coefficients, so any weighting,
mean or accumulation is data. Only `total` carries a gradient, once: a second derivative is refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.errors import TrainingError
from student_train.losses.rows import Head, RowLosses, RowTargets, labels_only, targets_only
from student_train.losses.sparse import merge_repeats
from student_train.losses.terms import IGNORE_LABEL, Divergence
from student_train.losses.walk import RowWalk, slice_rows

CHUNK_BYTES = 48 * 2**20
"""Float32 logits held at a time when nobody says otherwise."""


class Walk(NamedTuple):
    """How far one step of the walk reaches."""

    rows: int
    """Rows at a time."""
    columns: int | None
    """Vocabulary entries at a time; None walks by rows, over the whole vocabulary."""


class _Job(NamedTuple):
    targets: RowTargets
    divergence: Divergence
    walk: Walk
    scale: float
    want_gradient: bool


def by_rows(num_columns: int, *, budget_bytes: int = CHUNK_BYTES) -> Walk:
    """Plan chunks whose [n, V] float32 logits fit the budget."""
    return Walk(max(16, budget_bytes // (4 * num_columns)), None)


def by_vocabulary(num_rows: int, *, budget_bytes: int = CHUNK_BYTES) -> Walk:
    """Plan blocks whose [N, v] float32 logits fit the budget."""
    return Walk(max(1, num_rows), max(256, budget_bytes // (4 * max(1, num_rows))))


def head_losses(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: RowTargets,
    divergence: Divergence,
    *,
    walk: Walk | None = None,
) -> RowLosses:
    """Equal `eager.head_losses`, with memory for a few rows of logits.

    Args:
        hidden: Final hidden states of the rows, after the last norm.
        head: Only its real rows take part; gradients reach weight and bias if they want them.
        targets: Labels, teacher and coefficients of the rows; no gradient reaches them.
        divergence: What separates student and teacher. At a temperature other than 1, rows with a
            label meet the head twice.
        walk: Chunk shape; by rows within `CHUNK_BYTES` unless given.
    """
    if divergence.temperature == 1.0:
        return _walk_head(hidden, head, targets, divergence, walk)
    labelled = (targets.labels != IGNORE_LABEL).nonzero()[:, 0]
    hard = labels_only(targets.labels[labelled], targets.ce_coef[labelled])
    at_one = _walk_head(hidden[labelled], head, hard, divergence, walk)
    soft = targets_only(targets.sparse, targets.kl_coef)
    at_temperature = _walk_head(hidden, head, soft, divergence, walk, scale=1 / divergence.temperature)
    ce = torch.zeros_like(at_temperature.ce).index_copy(0, labelled, at_one.ce)
    return RowLosses(at_one.total + at_temperature.total, ce, at_temperature.kl)


def _walk_head(
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    divergence: Divergence,
    walk: Walk | None,
    *,
    scale: float = 1.0,
) -> RowLosses:
    weight, bias = head.real()
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    parts = [None if part is None else part.to(dtype) for part in (hidden, weight, bias)]
    want = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    job = _Job(targets, divergence, walk or by_rows(weight.shape[0]), scale, want)
    function = _ByRows if job.walk.columns is None else _ByVocabulary
    total, ce, kl = function.apply(*parts, job)  # type: ignore[no-untyped-call]
    return RowLosses(total, ce, kl)


class _ByRows(torch.autograd.Function):
    """Losses and gradients chunk by chunk; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: _Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(weight.dtype, torch.float32)
        targets, unit = _unit_targets(job.targets, precise)
        wants = [need and job.want_gradient for need in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, wants)
        ce, kl = (
            hidden.new_empty(hidden.shape[0], dtype=precise),
            hidden.new_empty(hidden.shape[0], dtype=precise),
        )
        room = hidden.new_empty(min(job.walk.rows, hidden.shape[0]), weight.shape[0], dtype=precise)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(hidden.shape[0], job.walk.rows):
                states = hidden[rows]
                walk = RowWalk(slice_rows(targets, rows), precise)
                logits = _logits(states, weight, bias, job.scale, room[: states.shape[0]])
                walk.absorb(logits, 0)
                ce[rows], kl[rows] = walk.finish(job.divergence, job.want_gradient)
                if job.want_gradient:
                    walk.gradient(logits, 0, job.scale)
                    gradients.add(rows, slice(None), logits)
        ctx.save_for_backward(unit, *gradients.done())
        return _outputs(ctx, ce, kl, job.targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        unit, *gradients = ctx.saved_tensors
        factor = grad * unit
        return (*(None if part is None else part * factor.to(part.dtype) for part in gradients), None)


class _ByVocabulary(torch.autograd.Function):
    """Streaming softmax forward; backward meets every block again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: _Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(weight.dtype, torch.float32)
        targets, unit = _unit_targets(job.targets, precise)
        ctx.job, ctx.walks = job, []
        ce, kl = (
            hidden.new_empty(hidden.shape[0], dtype=precise),
            hidden.new_empty(hidden.shape[0], dtype=precise),
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(hidden.shape[0], job.walk.rows):
                walk = RowWalk(slice_rows(targets, rows), precise)
                for columns in _slices(weight.shape[0], job.walk.columns or weight.shape[0]):
                    walk.absorb(_block(hidden[rows], weight, bias, columns, job.scale), columns.start)
                ce[rows], kl[rows] = walk.finish(job.divergence, job.want_gradient)
                ctx.walks.append((rows, walk))
        ctx.save_for_backward(hidden, weight, bias, unit)
        return _outputs(ctx, ce, kl, job.targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, bias, unit = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in _slices(weight.shape[0], ctx.job.walk.columns):
                for rows, walk in ctx.walks:
                    logits = _block(hidden[rows], weight, bias, columns, ctx.job.scale)
                    walk.reweigh(logits, columns.start)
                    walk.gradient(logits, columns.start, ctx.job.scale)
                    gradients.add(rows, columns, logits)
        factor = grad * unit
        return (
            *(None if part is None else part.mul_(factor.to(part.dtype)) for part in gradients.done()),
            None,
        )


class _Gradients:
    """Sums of dL/dhidden [N, D], dL/dweight [V, D], dL/dbias [V], as far as wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]) -> None:
        self._hidden, self._weight = hidden, weight
        precise = torch.promote_types(weight.dtype, torch.float32)
        inputs = (hidden, weight, bias)
        self._sums = [
            torch.zeros_like(part, dtype=precise) if want and part is not None else None
            for part, want in zip(inputs, wants, strict=True)
        ]

    def add(self, rows: slice, columns: slice, pull: Float[Tensor, "n v"]) -> None:
        """Add what dL/dlogits of one block gives."""
        to_hidden, to_weight, to_bias = self._sums
        if to_bias is not None:
            to_bias[columns] += pull.sum(dim=0)
        pull = pull.to(self._weight.dtype)
        if to_hidden is not None:
            _add_product(to_hidden[rows], pull, self._weight[columns])
        if to_weight is not None:
            _add_product(to_weight[columns], pull.t(), self._hidden[rows])

    def done(self) -> list[Tensor | None]:
        """Return the sums in the inputs' dtype."""
        return [None if part is None else part.to(self._weight.dtype) for part in self._sums]


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise TrainingError(
            "backward with create_graph=True reached the fused loss, which has first derivatives only; "
            'use implementation="eager" to differentiate twice'
        )


def _unit_targets(targets: RowTargets, dtype: torch.dtype) -> tuple[RowTargets, Tensor]:
    """Merge repeats and scale the coefficients to at most 1: float16 gradients would underflow otherwise.

    Returns the targets and the power of two that was divided out.
    """
    coefs = torch.stack([targets.ce_coef, targets.kl_coef]).to(dtype)
    largest = coefs.abs().max() if coefs.numel() else coefs.new_zeros(())
    unit = torch.exp2(torch.where(largest > 0, largest, 1.0).log2().ceil())
    ce_coef, kl_coef = coefs / unit
    return RowTargets(targets.labels, merge_repeats(targets.sparse), ce_coef, kl_coef), unit


def _outputs(ctx: Any, ce: Tensor, kl: Tensor, targets: RowTargets) -> tuple[Tensor, Tensor, Tensor]:
    ctx.mark_non_differentiable(ce, kl)
    return (targets.ce_coef * ce).sum() + (targets.kl_coef * kl).sum(), ce, kl


def _block(
    states: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, scale: float
) -> Float[Tensor, "n v"]:
    bias = None if bias is None else bias[columns]
    return _logits(states, weight[columns], bias, scale, None)


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, room: Tensor | None
) -> Float[Tensor, "n v"]:
    precise = torch.promote_types(weight.dtype, torch.float32)
    if room is None or room.dtype != weight.dtype:
        narrow = F.linear(states, weight, bias)
        logits = narrow.to(precise) if room is None else room.copy_(narrow)
    elif bias is None:
        logits = torch.mm(states, weight.t(), out=room)
    else:
        logits = torch.addmm(bias, states, weight.t(), out=room)
    return logits.mul_(scale) if scale != 1.0 else logits


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
