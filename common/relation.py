"""Relation matrices among an image's positions, and their low-rank factors.

    R = Z Zᵀ = H M Hᵀ,  M = WᵀW         Z = H Wᵀ are the vocabulary logits, never built
    A [P, r] with R ≈ A Aᵀ              r chosen per image, so that the error stays in tolerance

RDist is L = 1 − cos(R_s, R_t). With R̂ = R / ‖R‖, its gradient is −(R̂_t − cos·R̂_s) / ‖R_s‖: the part of
R̂_t across R̂_s. Replacing R̂_t by another unit matrix changes the gradient by at most
‖ΔR̂_t‖ / ‖R_s‖, while its length is sin θ / ‖R_s‖ with cos θ = 1 − L. So

    relative gradient error ≤ factor_error / sin θ,     factor_error = ‖R̂_t − R̂_A‖

which holds for every student, and is what the rank is chosen for and what is stored.

Axes: P positions, D width, V vocabulary, r rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from schemas.sample import Tile

_OVERSAMPLE = 16
_POWER_ITERATIONS = 2
_SEED = 0x5EED


class Factor(NamedTuple):
    """A relation's factor."""

    factor: Tensor
    """[P, r] A with R ≈ A Aᵀ."""
    error: float
    """‖R̂ − R̂_A‖ in the Frobenius norm: 0 is exact, √2 is nothing in common."""


def head_gram(weight: Tensor, *, rows: int = 16384) -> Tensor:
    """[D, D] M = WᵀW in float32, of a head's (or a head shard's) [V, D] weight, `rows` at a time."""
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), rows):
        wide = weight[start : start + rows].detach().float()
        gram.addmm_(wide.T, wide)
    return gram


def relation(hidden: Tensor, gram: Tensor | None, *, cosine: bool = False) -> Tensor:
    """[P, P] relation of [P, D] hidden states.

    Args:
        hidden: [P, D] final hidden states.
        gram: [D, D] M for a relation of the logits; None for one of the hidden states.
        cosine: Scale each row of Z (or H) to unit length first.
    """
    states = hidden.float()
    matrix = states @ states.T if gram is None else (states @ gram) @ states.T
    matrix = (matrix + matrix.T) / 2
    if cosine:
        scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
        matrix = matrix * scale[:, None] * scale[None, :]
    return matrix


def factor_relation(matrix: Tensor, *, tolerance: float, max_rank: int) -> Factor:
    """Factor of the smallest rank within `tolerance`, by a randomised range finder.

    Args:
        matrix: [P, P] symmetric, positive semi-definite.
        tolerance: Largest `error` wanted.
        max_rank: Largest rank kept, whatever error that leaves.
    """
    matrix = matrix.float()
    width = min(len(matrix), max_rank + _OVERSAMPLE)
    generator = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(len(matrix), width, generator=generator).to(matrix.device)
    for _ in range(_POWER_ITERATIONS + 1):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ (matrix @ basis))
    return _truncate(matrix, values, basis @ vectors, tolerance, max_rank)


def factor_exact(matrix: Tensor, *, tolerance: float, max_rank: int) -> Factor:
    """The same by a full eigendecomposition in float64: the slow twin of `factor_relation`."""
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(matrix)
    return _truncate(matrix, values, vectors, tolerance, max_rank)


def _truncate(matrix: Tensor, values: Tensor, vectors: Tensor, tolerance: float, max_rank: int) -> Factor:
    """Keep the fewest leading eigenpairs (given in rising order) within tolerance."""
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    norm = matrix.norm().double().clamp_min(torch.finfo(torch.float32).tiny)
    outside = (matrix - (vectors * values) @ vectors.T).norm().double()
    dropped = values.double().square().flip(0).cumsum(0).flip(0)  # [i]: energy of pairs i and later
    left = torch.cat([dropped, dropped.new_zeros(1)])[1:] + outside.square()  # after keeping i + 1 pairs
    errors = _direction_error((left.sqrt() / norm).clamp_max(1.0))
    fits = (errors <= tolerance).nonzero()
    rank = min(int(fits[0]) + 1 if len(fits) else len(values), max_rank, len(values))
    return Factor((vectors[:, :rank] * values[:rank].sqrt()).float(), float(errors[rank - 1]))


def _direction_error(residual: Tensor) -> Tensor:
    """‖R̂ − R̂_A‖ of a projection that leaves a relative residual ε: √(2 − 2√(1 − ε²)), without cancelling."""
    square = residual.square()
    return (2 * square / (1 + (1 - square).sqrt())).sqrt()


def rdist(student: Tensor, teacher: Tensor) -> Tensor:
    """RDist of two [P, P] relations: 1 − cos, each flattened."""
    return 1 - functional.cosine_similarity(student.flatten(), teacher.flatten(), dim=0)


def resample_factor(factor: Tensor, source: tuple[Tile, ...], target: tuple[Tile, ...]) -> Tensor:
    """Bring a factor from one image layout to another, so that differing patch grids can be compared.

    Each target tile is sampled bilinearly, patch centre to patch centre, from the source tile of the
    same rank in the list (from the last one when there are fewer). Equal grids come back unchanged.

    Args:
        factor: [P_source, r], rows at every position of the source's image span.
        source: The source's tiles, at least one.
        target: The target's tiles, at least one.

    Returns:
        [sum of rows × columns, r]: the target's patches, tile by tile, row by row.
    """
    pieces = []
    for index, wanted in enumerate(target):
        given = source[min(index, len(source) - 1)]
        grid = (
            factor[patch_positions(given).to(factor.device)]
            .view(given.rows, given.columns, -1)
            .permute(2, 0, 1)
        )
        if (given.rows, given.columns) != (wanted.rows, wanted.columns):
            grid = functional.interpolate(
                grid[None], (wanted.rows, wanted.columns), mode="bilinear", align_corners=False
            )[0]
        pieces.append(grid.permute(1, 2, 0).reshape(wanted.rows * wanted.columns, -1))
    return torch.cat(pieces)


def patch_positions(tile: Tile) -> Tensor:
    """[rows · columns] positions of a tile's patches, counted from the start of the image span."""
    rows = torch.arange(tile.rows)[:, None] * tile.stride
    return (tile.offset + rows + torch.arange(tile.columns)[None]).flatten()
