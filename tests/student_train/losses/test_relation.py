"""RDist through M and factors equals RDist through explicit logits."""

import pytest
import torch

from common.errors import MismatchError
from schemas.sample import Tile
from student_train.batch import RelationTarget
from student_train.losses import relation
from student_train.losses.rows import Head

NORMS = pytest.mark.parametrize("norm", ["none", "cosine"])


def by_definition(states: torch.Tensor, head: Head | None, factor: torch.Tensor, norm: str) -> torch.Tensor:
    """1 − cos of the two P×P matrices, the student's through its logits."""
    z = states
    if head is not None:
        weight, bias = head.real()
        z = torch.nn.functional.linear(states, weight, bias)
    if norm == "cosine":
        z, factor = z / z.norm(dim=1, keepdim=True), factor / factor.norm(dim=1, keepdim=True)
    student, teacher = (z @ z.T).flatten(), (factor @ factor.T).flatten()
    return 1 - student @ teacher / (student.norm() * teacher.norm())


def problem(sizes: tuple[int, ...], width: int, *, bias: bool, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(sizes) + 5, width, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(33, width, generator=g, dtype=torch.float64).requires_grad_()
    offset = torch.randn(33, generator=g, dtype=torch.float64).requires_grad_() if bias else None
    order = torch.randperm(sum(sizes) + 5, generator=g)
    targets, start = [], 0
    for i, size in enumerate(sizes):
        rows = order[start : start + size].sort().values
        factor = torch.randn(size, 3 + i % 2, generator=g, dtype=torch.float64)
        targets.append(RelationTarget(rows, factor, (), ()))
        start += size
    return hidden, Head(weight, offset, 30), targets


@NORMS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of", ["logits", "hidden"])
@pytest.mark.parametrize(("sizes", "width"), [((4, 7, 1), 9), ((12, 20), 5)], ids=["matrices", "traces"])
def test_equals_explicit_logits(sizes, width, of: str, bias: bool, norm: str) -> None:
    hidden, head, targets = problem(sizes, width, bias=bias)
    used = head if of == "logits" else None
    gram = None if used is None else relation.head_gram(used)
    got = relation.relation_distances(hidden, gram, targets, norm)
    want = torch.stack([by_definition(hidden[t.rows], used, t.factor, norm) for t in targets])
    torch.testing.assert_close(got, want)
    leaves = [hidden] + ([head.weight] if used else []) + ([head.bias] if used and bias else [])
    weights = torch.arange(1.0, len(sizes) + 1, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got @ weights, leaves), torch.autograd.grad(want @ weights, leaves)
    )


@NORMS
def test_both_ways_agree(norm: str) -> None:
    hidden, head, targets = problem((6, 6), 5, bias=False)
    gram = relation.head_gram(head)
    states = torch.stack([hidden[t.rows] for t in targets])
    factor = torch.stack([torch.nn.functional.pad(t.factor, (0, 4 - t.factor.shape[1])) for t in targets])
    torch.testing.assert_close(
        relation._by_matrices(states, gram, factor), relation._by_traces(states, gram, factor)
    )


@NORMS
def test_zero_when_the_student_is_the_teacher_and_scale_is_free(norm: str) -> None:
    hidden, head, (target,) = problem((6,), 9, bias=False)
    weight, _ = head.real()
    logits = (hidden[target.rows] @ weight.T).detach()
    same = RelationTarget(target.rows, 3.0 * logits, (), ())
    distance = relation.relation_distances(hidden, relation.head_gram(head), [same], norm)
    assert float(distance.detach()) < 1e-14


def test_near_students_keep_their_digits_in_float32() -> None:
    """1 − cos near 1e-9 has its leading digits, where 1 minus a float32 cosine has none."""
    hidden, head, (target,) = problem((6,), 9, bias=False)
    weight, _ = head.real()
    logits = (hidden[target.rows] @ weight.T).detach()
    target = RelationTarget(target.rows, logits + 1e-4 * torch.randn(logits.shape).double(), (), ())
    exact = relation.relation_distances(hidden, relation.head_gram(head), [target], "none").detach()
    narrow = Head(head.weight.float(), None, 30)
    found = relation.relation_distances(hidden.float(), relation.head_gram(narrow), [target], "none").detach()
    assert 1e-11 < float(exact) < 1e-7
    assert float(found) == pytest.approx(float(exact), rel=0.05)


def test_finite_where_an_image_is_all_zero() -> None:
    hidden, head, targets = problem((6, 4), 9, bias=False)
    with torch.no_grad():
        hidden[targets[0].rows] = 0
    for norm in ("none", "cosine"):
        total = relation.relation_distances(hidden, relation.head_gram(head), targets, norm).sum()
        (grad,) = torch.autograd.grad(total, hidden)
        assert total.isfinite()
        assert grad.isfinite().all()


def test_gram_of_a_narrow_head_is_float32_and_its_gradient_is_right() -> None:
    _, head, _ = problem((4,), 9, bias=True)
    assert torch.autograd.gradcheck(lambda w, b: relation.head_gram(Head(w, b, 30)), (head.weight, head.bias))
    narrow = Head(head.weight.detach().bfloat16(), None, 30)
    gram = relation.head_gram(narrow)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, narrow.weight[:30].float().T @ narrow.weight[:30].float())


class TestGrids:
    smooth = staticmethod(
        lambda tile: torch.stack(
            [
                (torch.arange(tile.rows)[:, None] + 0.5).expand(-1, tile.columns) / tile.rows,
                (torch.arange(tile.columns)[None] + 0.5).expand(tile.rows, -1) / tile.columns,
            ],
            -1,
        ).reshape(-1, 2)
    )

    def test_a_smooth_factor_is_resampled_and_other_positions_do_not_count(self) -> None:
        coarse = Tile(offset=0, rows=12, columns=12, stride=12)
        fine = Tile(offset=2, rows=9, columns=8, stride=9)
        target = RelationTarget(torch.arange(2 + 9 * 9), self.smooth(coarse), (fine,), (coarse,))
        factor, counted = relation.fit_factor(target)
        assert int(counted.sum()) == 72
        assert factor[counted[:, 0] == 0].eq(0).all()
        inner = (self.smooth(fine) - 0.5).abs().amax(1) < 0.4
        found = factor[counted[:, 0] == 1]
        torch.testing.assert_close(found[inner], self.smooth(fine)[inner], atol=1e-5, rtol=0)

    def test_equal_grids_pass_through(self) -> None:
        tile = Tile(offset=0, rows=2, columns=2, stride=3)
        target = RelationTarget(torch.arange(6), torch.rand(6, 2), (tile,), (tile,))
        factor, counted = relation.fit_factor(target)
        assert torch.equal(factor, target.factor)
        assert counted.all()

    def test_without_grids_unequal_sizes_are_refused(self) -> None:
        target = RelationTarget(torch.arange(6), torch.rand(5, 2), (), ())
        with pytest.raises(MismatchError, match="5 positions in the cache and 6"):
            relation.fit_factor(target)

    def test_a_grid_that_leaves_its_image_is_refused(self) -> None:
        tile, other = (Tile(offset=0, rows=n, columns=2, stride=2) for n in (4, 2))
        target = RelationTarget(torch.arange(6), torch.rand(4, 2), (tile,), (other,))
        with pytest.raises(
            MismatchError, match=r"ends at position 8 of an image with 6 positions \(student\)"
        ):
            relation.fit_factor(target)
