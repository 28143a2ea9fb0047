"""The two fused walks over the head as autograd functions; `fused.py` is their face.

Axes: N rows, D width, V real vocabulary; n rows and v vocabulary entries at a time.

    ByRows        [n, V] at a time; gradients are summed in forward, handed over by backward
    ByVocabulary  [N, v] at a time; forward streams the softmax, backward meets every block again

Gradient sums are float32. Coefficients are divided by a power of two so that the largest is at most 1
(float16 gradients of 1/N would underflow), and backward multiplies it back in.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.errors import TrainingError
from student_train.losses.rows import RowTargets
from student_train.losses.sparse import merge_repeats
from student_train.losses.terms import Divergence
from student_train.losses.walk import RowWalk, slice_rows

Gradients = list[Tensor | None]

PRODUCT_ROWS = 16_384
"""Head rows a low-precision product is formed for before it is added to a float32 sum."""


class Walk(NamedTuple):
    """How far one step of the walk reaches."""

    rows: int
    """Rows at a time."""
    columns: int | None
    """Vocabulary entries at a time; None walks by rows, over the whole vocabulary."""


class Job(NamedTuple):
    """Everything about a call that carries no gradient."""

    targets: RowTargets
    """Repeats merged, coefficients at most 1."""
    unit: Tensor
    """What the coefficients were divided by."""
    vocab_size: int
    """Real rows of the head."""
    divergence: Divergence
    """What separates student and teacher."""
    walk: Walk
    """Chunk shape."""
    scale: float
    """Factor of the logits: 1 / temperature."""
    wants: tuple[bool, bool, bool]
    """Whether hidden, weight and bias want a gradient."""


def make_job(
    targets: RowTargets,
    vocab_size: int,
    divergence: Divergence,
    walk: Walk,
    *,
    dtype: torch.dtype,
    scale: float,
    wants: tuple[bool, bool, bool],
) -> Job:
    """Prepare targets: merge repeated ids, scale the coefficients by a power of two.

    Args:
        targets: As the caller has them.
        vocab_size: Real rows of the head.
        divergence: What separates student and teacher.
        walk: Chunk shape.
        dtype: Precision of losses and gradient sums.
        scale: Factor of the logits.
        wants: Whether hidden, weight and bias want a gradient.
    """
    coefs = torch.stack([targets.ce_coef, targets.kl_coef]).to(dtype)
    largest = coefs.abs().max() if coefs.numel() else coefs.new_zeros(())
    unit = torch.exp2(torch.where(largest > 0, largest, 1.0).log2().ceil())
    ce_coef, kl_coef = coefs / unit
    merged = RowTargets(targets.labels, merge_repeats(targets.sparse), ce_coef, kl_coef)
    return Job(merged, unit, vocab_size, divergence, walk, scale, wants)


class ByRows(torch.autograd.Function):
    """Losses and gradients chunk by chunk in forward.

    The first backward gives its gradient buffers away; another one (`retain_graph`) walks again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (total, cross-entropy [N], divergence [N])."""
        ctx.job = job
        ctx.save_for_backward(hidden, weight, bias)
        ce, kl, ctx.gradients = _walk_rows(hidden, weight, bias, job)
        ctx.mark_non_differentiable(ce, kl)
        return _total(job, ce, kl), ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Hand over the gradients times `grad`."""
        _refuse_second_derivative()
        hidden, weight, bias = ctx.saved_tensors
        gradients = ctx.gradients
        if gradients is None:
            gradients = _walk_rows(hidden, weight, bias, ctx.job)[2]
        ctx.gradients = None
        return (*_finish(gradients, grad * ctx.job.unit, weight.dtype), None)


class ByVocabulary(torch.autograd.Function):
    """Streaming softmax forward; backward meets every block again. Nothing [V, D] is held in between."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (total, cross-entropy [N], divergence [N])."""
        dtype = job.unit.dtype
        ctx.job, ctx.walks = job, []
        ce, kl = hidden.new_empty(2, hidden.shape[0], dtype=dtype).unbind()
        room = _room(hidden, job)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(hidden.shape[0], job.walk.rows):
                walk = RowWalk(slice_rows(job.targets, rows), dtype)
                for columns in _blocks(job):
                    logits = _logits(hidden[rows], weight, bias, columns, job, room)
                    walk.absorb(logits, columns.start)
                ce[rows], kl[rows] = walk.finish(job.divergence, any(job.wants))
                ctx.walks.append((rows, walk))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(ce, kl)
        return _total(job, ce, kl), ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Walk again and return the gradients times `grad`."""
        _refuse_second_derivative()
        hidden, weight, bias = ctx.saved_tensors
        job = ctx.job
        dtype = weight.dtype if len(ctx.walks) == 1 else job.unit.dtype
        to_hidden, to_weight, to_bias = _empty_gradients(hidden, weight, bias, job, weight_dtype=dtype)
        room = _room(hidden, job)
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in _blocks(job):
                for rows, walk in ctx.walks:
                    pull = _logits(hidden[rows], weight, bias, columns, job, room)
                    walk.reweigh(pull, columns.start)
                    walk.gradient(pull, columns.start, job.scale)
                    _pull_back(
                        pull,
                        (hidden[rows], weight[columns]),
                        (to_hidden, to_weight, to_bias),
                        (rows, columns),
                    )
        return (*_finish([to_hidden, to_weight, to_bias], grad * job.unit, weight.dtype), None)


def _walk_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
) -> tuple[Tensor, Tensor, Gradients]:
    dtype, everything = job.unit.dtype, slice(0, job.vocab_size)
    gradients = _empty_gradients(hidden, weight, bias, job, weight_dtype=dtype)
    ce, kl = hidden.new_empty(2, hidden.shape[0], dtype=dtype).unbind()
    room = _room(hidden, job)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _slices(hidden.shape[0], job.walk.rows):
            states = hidden[rows]
            walk = RowWalk(slice_rows(job.targets, rows), dtype)
            pull = _logits(states, weight, bias, everything, job, room)
            walk.absorb(pull, 0)
            ce[rows], kl[rows] = walk.finish(job.divergence, any(job.wants))
            if any(job.wants):
                walk.gradient(pull, 0, job.scale)
                _pull_back(pull, (states, weight[everything]), gradients, (rows, everything))
    return ce, kl, gradients


def _room(hidden: Tensor, job: Job) -> Float[Tensor, " room"]:
    rows = min(job.walk.rows, hidden.shape[0])
    columns = min(job.walk.columns or job.vocab_size, job.vocab_size)
    return hidden.new_empty(rows * columns, dtype=job.unit.dtype)


def _logits(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: slice,
    job: Job,
    room: Float[Tensor, " room"],
) -> Float[Tensor, "n v"]:
    """Write the logits of a block into the room, in float32."""
    weight, bias = weight[columns], None if bias is None else bias[columns]
    logits = room[: states.shape[0] * weight.shape[0]].view(states.shape[0], weight.shape[0])
    if logits.dtype != weight.dtype:
        logits.copy_(F.linear(states, weight, bias))
    elif bias is None:
        torch.mm(states, weight.t(), out=logits)
    else:
        torch.addmm(bias, states, weight.t(), out=logits)
    return logits.mul_(job.scale) if job.scale != 1.0 else logits


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, *, weight_dtype: torch.dtype
) -> Gradients:
    dtypes = (job.unit.dtype, weight_dtype, job.unit.dtype)
    return [
        torch.zeros_like(part, dtype=dtype) if want and part is not None else None
        for part, want, dtype in zip((hidden, weight, bias), job.wants, dtypes, strict=True)
    ]


def _pull_back(
    pull: Float[Tensor, "n v"],
    inputs: tuple[Tensor, Tensor],
    gradients: Sequence[Tensor | None],
    where: tuple[slice, slice],
) -> None:
    """Add what dL/dlogits of one block gives to the gradients of hidden, weight and bias."""
    (states, weight), (rows, columns) = inputs, where
    to_hidden, to_weight, to_bias = gradients
    if to_bias is not None:
        to_bias[columns] += pull.sum(dim=0)
    pull = pull.to(weight.dtype)
    if to_hidden is not None:
        _add_product(to_hidden[rows], pull, weight)
    if to_weight is not None:
        _add_product(to_weight[columns], pull.t(), states)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right)
        return
    for part in _slices(into.shape[0], PRODUCT_ROWS):
        into[part] += left[part] @ right


def _finish(gradients: Gradients, factor: Tensor, dtype: torch.dtype) -> Gradients:
    return [None if part is None else part.mul_(factor).to(dtype) for part in gradients]


def _total(job: Job, ce: Tensor, kl: Tensor) -> Tensor:
    return ((job.targets.ce_coef * ce).sum() + (job.targets.kl_coef * kl).sum()) * job.unit


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise TrainingError(
            "backward with create_graph=True reached the fused loss, which has first derivatives only; "
            'use implementation="eager" to differentiate twice'
        )


def _blocks(job: Job) -> Iterator[slice]:
    return _slices(job.vocab_size, job.walk.columns or job.vocab_size)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
