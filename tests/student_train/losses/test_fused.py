"""The fused walk equals the eager definition and never holds [N, V]."""

import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import TrainingError
from student_train.losses import eager, fused
from student_train.losses.rows import Head, RowTargets
from student_train.losses.terms import Divergence
from student_train.losses.walk import slice_rows
from tests.student_train.losses.cases import case, divergences

WALKS = [
    fused.Walk(3, None),
    fused.Walk(100, None),
    fused.Walk(4, 5),
    fused.Walk(100, 8),
    fused.Walk(2, 1000),
]


def gradients(total: torch.Tensor, hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    wanted = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return list(torch.autograd.grad(total, wanted))


def assert_twins(
    problem: tuple[torch.Tensor, Head, RowTargets], divergence: Divergence, walk: fused.Walk
) -> None:
    want = eager.head_losses(*problem, divergence)
    got = fused.head_losses(*problem, divergence, walk=walk)
    torch.testing.assert_close(tuple(got), tuple(want))
    torch.testing.assert_close(gradients(got.total, *problem[:2]), gradients(want.total, *problem[:2]))


@pytest.mark.parametrize("walk", WALKS, ids=str)
@pytest.mark.parametrize("divergence", divergences(), ids=lambda d: f"{d.kind}-{d.tail}")
def test_equals_eager(divergence: Divergence, walk: fused.Walk) -> None:
    assert_twins(case(9, 23, 5), divergence, walk)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 40),
    k=st.integers(0, 40),
    rows=st.integers(1, 12),
    columns=st.none() | st.integers(1, 50),
    bias=st.booleans(),
    pad=st.integers(0, 2),
    divergence=st.sampled_from(divergences()),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    seed=st.integers(0, 1000),
)
def test_equals_eager_at_any_shape(n, v, k, rows, columns, bias, pad, divergence, temperature, seed) -> None:
    problem = case(n, v, min(k, v), seed=seed, bias=bias, pad=pad)
    divergence = divergence.model_copy(update={"temperature": temperature})
    assert_twins(problem, divergence, fused.Walk(rows, columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("walk", [fused.Walk(16, None), fused.Walk(64, 64), fused.Walk(20, 64)], ids=str)
def test_low_precision_errs_no_more_than_eager(dtype: torch.dtype, walk: fused.Walk) -> None:
    problem = case(64, 500, 16, width=32, dtype=dtype)
    hidden, head, targets = problem
    exact = (
        hidden.detach().double().requires_grad_(),
        Head(
            head.weight.detach().double().requires_grad_(), head.bias.detach().double().requires_grad_(), 500
        ),
        targets,
    )
    divergence = Divergence()
    truth = eager.head_losses(*exact, divergence)
    truths = gradients(truth.total, *exact[:2])
    errors = []
    for losses in (
        eager.head_losses(*problem, divergence),
        fused.head_losses(*problem, divergence, walk=walk),
    ):
        found = [losses.ce, losses.kl, *gradients(losses.total, hidden, head)]
        wanted = [truth.ce, truth.kl, *truths]
        errors.append([float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)])
    for slow, fast in zip(*errors, strict=True):
        assert fast <= 1.1 * slow + 1e-6


class SizeLimit(TorchDispatchMode):
    """Fails when an operation makes a tensor of `limit` elements or more."""

    def __init__(self, limit: int, allowed: tuple[int, ...]) -> None:
        super().__init__()
        self.limit, self.allowed, self.largest = limit, allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) != self.allowed:
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() < self.limit, f"{func} made {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("walk", [fused.Walk(16, None), fused.Walk(200, 64)], ids=str)
def test_never_makes_rows_by_vocabulary(walk: fused.Walk) -> None:
    problem = case(200, 1000, 8, bias=False, pad=0)
    with SizeLimit(200 * 1000 // 10, allowed=(1000, 7)) as limit:
        fused.head_losses(*problem, Divergence(), walk=walk).total.backward()
    assert limit.largest >= 16 * 1000 // 2


def test_size_limit_catches_the_eager_path() -> None:
    problem = case(200, 1000, 8, bias=False, pad=0)
    with pytest.raises(AssertionError, match=r"made \(200, 1000\)"), SizeLimit(200 * 1000, allowed=()):
        eager.head_losses(*problem, Divergence())


@pytest.mark.parametrize("walk", [fused.Walk(4, None), fused.Walk(4, 8)], ids=str)
class TestBehaviour:
    def test_second_derivative_is_refused(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4)
        total = fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total
        with pytest.raises(TrainingError, match="first derivatives only"):
            torch.autograd.grad(total, hidden, create_graph=True)

    def test_backward_twice_gives_twice(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4)
        total = fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total
        total.backward(retain_graph=True)
        once = head.weight.grad.clone()
        total.backward()
        torch.testing.assert_close(head.weight.grad, 2 * once)

    def test_values_agree_without_gradients(self, walk: fused.Walk) -> None:
        problem = case(6, 20, 4)
        want = fused.head_losses(*problem, Divergence(), walk=walk)
        with torch.no_grad():
            got = fused.head_losses(*problem, Divergence(), walk=walk)
        with torch.inference_mode():
            inferred = fused.head_losses(*problem, Divergence(), walk=walk)
        assert not got.total.requires_grad
        torch.testing.assert_close(tuple(got), tuple(t.detach() for t in want))
        torch.testing.assert_close(inferred.total, want.total.detach())

    def test_autocast_matches_eager_under_autocast(self, walk: fused.Walk) -> None:
        problem = case(6, 20, 4, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = eager.head_losses(*problem, Divergence())
            got = fused.head_losses(*problem, Divergence(), walk=walk)
        torch.testing.assert_close(got.total, want.total, rtol=1e-4, atol=1e-4, check_dtype=False)
        found, wanted = gradients(got.total, *problem[:2]), gradients(want.total, *problem[:2])
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
        assert found[1].dtype == torch.float32

    def test_accumulation_equals_one_call(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(9, 20, 4)
        whole = gradients(
            fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total, hidden, head
        )
        for rows in (slice(0, 4), slice(4, 9)):
            part = slice_rows(targets, rows)
            fused.head_losses(hidden[rows], head, part, Divergence(), walk=walk).total.backward()
        torch.testing.assert_close([hidden.grad, head.weight.grad, head.bias.grad], whole)

    def test_frozen_head_gets_no_gradient(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4)
        want = gradients(eager.head_losses(hidden, head, targets, Divergence()).total, hidden, head)[0]
        frozen = Head(head.weight.detach(), head.bias.detach(), head.vocab_size)
        fused.head_losses(hidden, frozen, targets, Divergence(), walk=walk).total.backward()
        torch.testing.assert_close(hidden.grad, want)

    def test_tied_head_adds_up(self, walk: fused.Walk) -> None:
        _, head, targets = case(6, 20, 4, pad=0, bias=False)
        tokens = torch.arange(6)

        def gradient(module) -> torch.Tensor:
            extra = {} if module is eager else {"walk": walk}
            total = module.head_losses(head.weight[tokens], head, targets, Divergence(), **extra).total
            return torch.autograd.grad(total, head.weight)[0]

        torch.testing.assert_close(gradient(fused), gradient(eager))

    def test_padding_rows_get_no_gradient(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4, pad=5)
        fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total.backward()
        assert head.weight.grad[20:].eq(0).all()
        assert head.weight.grad[:20].ne(0).any(1).all()

    def test_same_bits_every_time(self, walk: fused.Walk) -> None:
        problem = case(40, 200, 9, dtype=torch.float32)
        runs = []
        for _ in range(2):
            losses = fused.head_losses(*problem, Divergence(), walk=walk)
            runs.append([losses.total, *gradients(losses.total, *problem[:2])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_checkpointing_changes_nothing(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4)

        def total(states: torch.Tensor) -> torch.Tensor:
            return fused.head_losses(states.tanh(), head, targets, Divergence(), walk=walk).total

        want = gradients(total(hidden), hidden, head)
        kept = torch.utils.checkpoint.checkpoint(total, hidden, use_reentrant=False)
        torch.testing.assert_close(gradients(kept, hidden, head), want)

    def test_gradients_handed_over_are_not_shared(self, walk: fused.Walk) -> None:
        """A caller may change the gradient it got; a second backward must not see that."""
        hidden, head, targets = case(6, 20, 4)
        total = fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total
        first = torch.autograd.grad(3 * total, head.weight, retain_graph=True)[0]
        want = first.clone() / 3
        first.zero_()
        torch.testing.assert_close(torch.autograd.grad(total, head.weight)[0], want)

    def test_float16_gradients_survive_small_coefficients(self, walk: fused.Walk) -> None:
        """A mean over ten million rows, scaled back up: as good as the same without any scaling."""
        hidden, head, targets = case(6, 20, 4, dtype=torch.float16)
        small = dataclasses.replace(targets, ce_coef=targets.ce_coef * 1e-7, kl_coef=targets.kl_coef * 1e-7)
        want = gradients(
            fused.head_losses(hidden, head, targets, Divergence(), walk=walk).total, hidden, head
        )
        scaled = 1e7 * fused.head_losses(hidden, head, small, Divergence(), walk=walk).total
        for found, wanted in zip(gradients(scaled, hidden, head), want, strict=True):
            assert float((found - wanted).float().norm() / wanted.float().norm()) < 5e-3

    def test_a_nan_shows_in_its_row_and_in_the_total(self, walk: fused.Walk) -> None:
        hidden, head, targets = case(6, 20, 4)
        with torch.no_grad():
            hidden[3] = torch.nan
        losses = fused.head_losses(hidden, head, targets, Divergence(), walk=walk)
        assert losses.kl.isnan().tolist() == [False, False, False, True, False, False]
        assert losses.total.isnan()
