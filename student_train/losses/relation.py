"""RDist: 1 − cos(R_student, R_teacher) for each image, without logits.

Axes: I images, P positions, D width, V vocabulary, R rank.

    R_s = Z Zᵀ with Z = H Wᵀ        so R_s = H M Hᵀ with M = WᵀW: D×D, once for a frozen head
    R_t ≈ A Aᵀ                      A [P, R] from the cache

Up to P = D both R are formed (P×P) and 1 − cos = ½ ‖R_s/‖R_s‖ − R_t/‖R_t‖‖², which keeps its digits
when the student is near. Above, traces: ⟨R_s, R_t⟩ = tr(Aᵀ R_s A), ‖R_s‖² = tr((M HᵀH)²), D×D only,
with an absolute error near 1e-6 in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common.errors import MismatchError
from common.relation import patch_positions, resample_factor
from schemas.sample import Tile
from student_train.batch import RelationTarget
from student_train.losses.rows import Head

GRAM_ROWS = 16_384
"""Head rows converted to float32 at a time while M is summed."""


def relation_distances(
    hidden: Float[Tensor, "N D"],
    gram: Float[Tensor, "E E"] | None,
    targets: Sequence[RelationTarget],
    norm: str,
) -> Float[Tensor, " I"]:
    """Return 1 − cos(R_s, R_t) of each image, in [0, 1] for these positive semi-definite matrices.

    Args:
        hidden: Hidden states of all B·T rows.
        gram: M [D, D], [D + 1, D + 1] for a head with a bias, None for R = H Hᵀ.
        targets: One per image; ragged.
        norm: `none`, or `cosine`: rows of both sides scaled to unit length first.

    Raises:
        MismatchError: The patch grids do not fit each other or the rows.
    """
    fitted = [fit_factor(target) for target in targets]
    states = pad_sequence([hidden.index_select(0, target.rows) for target in targets], batch_first=True)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if gram is not None and gram.shape[0] == states.shape[2] + 1:
        states = torch.cat([states, torch.ones_like(states[..., :1])], dim=2)
    states = states * pad_sequence([counted for _, counted in fitted], batch_first=True)
    rank = max(factor.shape[1] for factor, _ in fitted)
    wide = [F.pad(factor, (0, rank - factor.shape[1])) for factor, _ in fitted]
    factor = pad_sequence(wide, batch_first=True).to(states.dtype)
    gram = None if gram is None else gram.to(states.dtype)
    with torch.autocast(states.device.type, enabled=False):
        if norm == "cosine":
            states, factor = _unit_rows(states, gram), F.normalize(factor, dim=2)
        long = states.shape[1] > states.shape[2]
        return (_by_traces if long else _by_matrices)(states, gram, factor)


def head_gram(head: Head) -> Float[Tensor, "E E"]:
    """Return M = WᵀW over the real rows, with the bias as one more column of W; float32.

    The gradient of a trained head flows through it (D²V multiply-adds each way).
    """
    weight, bias = head.real()
    with torch.autocast(weight.device.type, enabled=False):
        gram: Tensor = _Gram.apply(weight)  # type: ignore[no-untyped-call]
        if bias is None:
            return gram
        cross = (bias @ weight).to(gram.dtype)
        corner = bias.to(gram.dtype).square().sum()[None]
    return torch.cat([torch.cat([gram, cross[:, None]], 1), torch.cat([cross, corner])[None]], 0)


def fit_factor(target: RelationTarget) -> tuple[Float[Tensor, "P R"], Float[Tensor, "P 1"]]:
    """Return the teacher's factor on the student's positions, and 1 for each position that counts.

    Equal grids pass through, and all positions count. Otherwise the factor is resampled over the patch
    grids, and only patches count.
    """
    positions, factor = target.rows.shape[0], target.factor
    if target.tiles == target.teacher_tiles and factor.shape[0] == positions:
        return factor, factor.new_ones(positions, 1)
    if not target.tiles or not target.teacher_tiles:
        raise MismatchError(
            f"an image has {factor.shape[0]} positions in the cache and {positions} in the student's "
            f"sequence, and without patch grids on both sides a factor cannot be resampled; use a student of "
            f"the teacher's image processor, or set the relation weight to 0"
        )
    for side, tiles, length in (
        ("cache", target.teacher_tiles, factor.shape[0]),
        ("student", target.tiles, positions),
    ):
        _check_tiles(side, tiles, length)
    where = torch.cat([patch_positions(tile) for tile in target.tiles]).to(factor.device)
    patches = resample_factor(factor, target.teacher_tiles, target.tiles)
    fitted = factor.new_zeros(positions, factor.shape[1]).index_copy(0, where, patches)
    return fitted, factor.new_zeros(positions, 1).index_fill(0, where, 1.0)


def _check_tiles(side: str, tiles: tuple[Tile, ...], length: int) -> None:
    for tile in tiles:
        stop = tile.offset + (tile.rows - 1) * tile.stride + tile.columns
        if stop > length:
            raise MismatchError(
                f"a patch grid of {tile.rows} × {tile.columns} ends at position {stop} of an image with "
                f"{length} positions ({side}); check that both come from the same image processor"
            )


def _times(states: Tensor, gram: Tensor | None) -> Tensor:
    return states if gram is None else states @ gram


def _unit_rows(states: Float[Tensor, "I P D"], gram: Tensor | None) -> Float[Tensor, "I P D"]:
    squares = (_times(states, gram) * states).sum(dim=2, keepdim=True)
    return states * _inverse_root(squares)


def _inverse_root(squares: Tensor) -> Tensor:
    """1/√x, and 0 without a gradient where x is nothing: an all-zero row or matrix stays one."""
    nothing = squares <= torch.finfo(squares.dtype).tiny
    return torch.where(nothing, 0.0, squares.masked_fill(nothing, 1.0).rsqrt())


def _by_matrices(states: Tensor, gram: Tensor | None, factor: Tensor) -> Float[Tensor, " I"]:
    student = _times(states, gram) @ states.mT
    teacher = factor @ factor.mT
    apart = _unit_matrix(student) - _unit_matrix(teacher)
    return apart.square().sum(dim=(1, 2)) / 2


def _unit_matrix(matrix: Tensor) -> Tensor:
    return matrix * _inverse_root(matrix.square().sum(dim=(1, 2), keepdim=True))


def _by_traces(states: Tensor, gram: Tensor | None, factor: Tensor) -> Float[Tensor, " I"]:
    across = states.mT @ factor
    inner = (across * (across if gram is None else gram @ across)).sum(dim=(1, 2))
    moment = _times(states.mT @ states, gram)
    student = (moment * moment.mT).sum(dim=(1, 2))
    teacher = (factor.mT @ factor).square().sum(dim=(1, 2))
    return 1 - inner * _inverse_root(student) * _inverse_root(teacher)


class _Gram(torch.autograd.Function):
    """WᵀW in float32, a block of rows at a time, so that a low-precision head is never copied whole."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        precise = torch.promote_types(weight.dtype, torch.float32)
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=precise)
        for start in range(0, weight.shape[0], GRAM_ROWS):
            rows = weight[start : start + GRAM_ROWS].to(precise)
            gram.addmm_(rows.t(), rows)
        return gram

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight: Tensor = ctx.saved_tensors[0]
        return weight @ (grad + grad.t()).to(weight.dtype)
