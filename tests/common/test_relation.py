"""Laws of relations and their factors; the randomised factor is held to the exact one."""

import pytest
import torch

from common.relation import (
    factor_exact,
    factor_relation,
    head_gram,
    patch_positions,
    rdist,
    relation,
    resample_factor,
)
from schemas.sample import Tile


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_states(
    positions: int = 144, width: int = 64, *, decay: float = 0.55, seed: int = 0
) -> torch.Tensor:
    """States with the falling spectrum and common offset that towers give."""
    basis = torch.linalg.qr(random(width, width, seed=seed)).Q
    strength = torch.arange(1, width + 1).float() ** -decay
    return (random(positions, width, seed=seed + 1) * strength) @ basis + 0.5 * random(width, seed=seed + 2)


def direction_error(factor: torch.Tensor, matrix: torch.Tensor) -> float:
    kept, exact = (factor.double() @ factor.double().T), matrix.double()
    return float((kept / kept.norm() - exact / exact.norm()).norm())


def test_relation_of_logits_needs_no_logits():
    hidden, weight = random(36, 24), random(500, 24, seed=1)
    logits = hidden @ weight.T
    torch.testing.assert_close(
        relation(hidden, head_gram(weight, rows=77)), logits @ logits.T, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("of_logits", [True, False])
def test_cosine_relation_has_unit_diagonal(of_logits: bool):
    gram = head_gram(random(500, 24, seed=1)) if of_logits else None
    matrix = relation(random(36, 24), gram, cosine=True)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(36))
    assert float(matrix.abs().max()) <= 1 + 1e-5


def test_relation_does_not_care_about_scale():
    hidden = random(36, 24)
    assert float(rdist(relation(hidden, None), relation(3 * hidden, None))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_factor_is_within_tolerance_and_says_its_error(tolerance: float, decay: float):
    matrix = relation(image_states(decay=decay), None)
    factor, error = factor_relation(matrix, tolerance=tolerance, max_rank=128)
    assert error <= tolerance
    assert direction_error(factor, matrix) == pytest.approx(error, rel=0.05, abs=2e-6)


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_random_factor_is_as_small_as_the_exact_one(decay: float):
    matrix = relation(image_states(decay=decay), None)
    fast = factor_relation(matrix, tolerance=1e-2, max_rank=128).factor
    slow = factor_exact(matrix, tolerance=1e-2, max_rank=128).factor
    assert slow.shape[1] <= fast.shape[1] <= slow.shape[1] + 1
    # The kept parts agree to what both leave out; their directions may mix.
    assert float((fast @ fast.T - slow @ slow.T).norm() / matrix.norm()) <= 3e-3


def test_rank_is_bounded_and_the_error_left_is_told():
    matrix = relation(random(100, 90), None)  # flat spectrum
    factor, error = factor_relation(matrix, tolerance=1e-6, max_rank=8)
    assert factor.shape == (100, 8)
    assert error > 1e-2
    assert direction_error(factor, matrix) == pytest.approx(error, rel=0.05)
    assert error >= factor_exact(matrix, tolerance=1e-6, max_rank=8).error - 1e-6


def test_one_position_and_equal_positions():
    assert factor_relation(
        torch.tensor([[4.0]]), tolerance=1e-3, max_rank=8
    ).factor.abs().item() == pytest.approx(2)
    ones = factor_relation(torch.full((9, 9), 2.0), tolerance=1e-3, max_rank=8)
    assert ones.factor.shape == (9, 1)
    assert ones.error <= 1e-5


def test_a_zero_relation_has_a_zero_factor():
    found = factor_relation(torch.zeros(9, 9), tolerance=1e-3, max_rank=8)
    assert torch.equal(found.factor @ found.factor.T, torch.zeros(9, 9))


def test_a_rerun_gives_the_same_bits():
    matrix = relation(image_states(), None)
    first, second = (factor_relation(matrix, tolerance=1e-3, max_rank=32) for _ in range(2))
    assert torch.equal(first.factor, second.factor)


@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("likeness", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("tolerance", [3e-2, 1e-3])
def test_stored_error_bounds_the_gradient_error_of_every_student(
    decay: float, likeness: float, tolerance: float
):
    """‖Δgradient‖ / ‖gradient‖ ≤ error / sin θ, from a stranger to a student that is nearly the teacher."""
    teacher = image_states(decay=decay).double()
    student = likeness * teacher + (1 - likeness) * image_states(decay=decay, seed=9).double()
    exact = teacher @ teacher.T
    factor, error = factor_relation(exact, tolerance=tolerance, max_rank=128)
    kept = factor.double() @ factor.double().T

    def gradient(target: torch.Tensor) -> torch.Tensor:
        free = (student @ student.T).requires_grad_()
        (found,) = torch.autograd.grad(rdist(free, target), free)
        return found

    true = gradient(exact)
    cosine = 1 - float(rdist(student @ student.T, exact))
    sine = (1 - cosine**2) ** 0.5
    change = float((gradient(kept) - true).norm() / true.norm())
    assert change <= (error + 2e-6) / sine
    assert change >= 0.2 * error  # and tracks it: the bound is no idle one


def tile(rows: int, columns: int, *, offset: int = 0, stride: int | None = None) -> Tile:
    return Tile(offset=offset, rows=rows, columns=columns, stride=stride or columns)


def test_equal_grids_come_back_unchanged():
    factor = random(20, 5)
    layout = (tile(4, 4, stride=5),)
    assert torch.equal(resample_factor(factor, layout, layout), factor[patch_positions(layout[0])])


def test_resampling_keeps_a_linear_field():
    rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    field = torch.stack([rows / 8, columns / 8], -1).reshape(64, 2)
    small = resample_factor(field, (tile(8, 8),), (tile(4, 4),)).reshape(4, 4, 2)
    expected = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(small[:, 0, 0], expected)
    torch.testing.assert_close(small[0, :, 1], expected)


def test_resampling_skips_newlines_and_walks_tiles():
    base, fine = tile(2, 2), tile(3, 4, offset=4, stride=5)
    factor = torch.arange(4 + 15).float()[:, None]
    factor[patch_positions(fine)] = 7.0
    found = resample_factor(factor, (base, fine), (base, tile(6, 6)))
    assert found[:4, 0].tolist() == [0, 1, 2, 3]
    assert bool((found[4:] == 7).all())
    assert len(found) == 4 + 36
