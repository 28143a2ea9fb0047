"""Laws of the sparse divergences, each against the dense definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from student_train.batch import SparseTargets
from student_train.losses import eager
from student_train.losses.sparse import merge_repeats
from student_train.losses.terms import Divergence
from tests.student_train.losses.cases import KINDS, awkward, case, divergences, sparse_of


def dense(p: torch.Tensor, q: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """The textbook divergence of two [N, V] probability matrices, in nats."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(b.log(), a, reduction="none").sum(1)

    beta, skew = divergence.beta, divergence.skew
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "skew_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, skew * q + (1 - skew) * p),
    }[divergence.kind]()


def pair(n: int, v: int, *, seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    teacher, student = (scale * torch.randn(2, n, v, generator=g, dtype=torch.float64)).unbind()
    return teacher, student


any_divergence = pytest.mark.parametrize("divergence", divergences(), ids=lambda d: f"{d.kind}-{d.tail}")
any_kind = pytest.mark.parametrize("kind", KINDS)


@any_divergence
def test_zero_when_the_student_is_the_teacher(divergence: Divergence) -> None:
    teacher, _ = pair(6, 30)
    loss = eager.sparse_divergence(teacher, sparse_of(teacher, 7), divergence)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)


@any_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_dense_when_all_is_kept(divergence: Divergence, temperature: float) -> None:
    teacher, student = pair(6, 30)
    divergence = divergence.model_copy(update={"temperature": temperature})
    targets = sparse_of(teacher, 30, temperature=temperature)
    want = dense((teacher / temperature).softmax(1), (student / temperature).softmax(1), divergence)
    torch.testing.assert_close(eager.sparse_divergence(student, targets, divergence), want)


@settings(max_examples=60, deadline=None)
@given(
    v=st.integers(2, 40),
    k=st.integers(0, 39),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.05, 0.95),
    scale=st.sampled_from([0.1, 2.0, 10.0]),
)
def test_never_exceeds_dense_and_never_negative(v, k, seed, kind, beta, scale) -> None:
    teacher, student = pair(4, v, seed=seed, scale=scale)
    divergence = Divergence(kind=kind, beta=beta, skew=beta)
    sparse = eager.sparse_divergence(student, sparse_of(teacher, min(k, v - 1)), divergence)
    whole = dense(teacher.softmax(1), student.softmax(1), divergence)
    assert (sparse >= -1e-10).all()
    assert (sparse <= whole * (1 + 1e-9) + 1e-9).all()


@any_kind
def test_keeping_more_never_says_less(kind: str) -> None:
    teacher, student = pair(5, 25)
    losses = [
        eager.sparse_divergence(student, sparse_of(teacher, k), Divergence(kind=kind)) for k in range(26)
    ]
    for fewer, more in itertools.pairwise(losses):
        assert (more >= fewer - 1e-10).all()


@any_divergence
def test_order_of_slots_is_irrelevant(divergence: Divergence) -> None:
    teacher, student = pair(6, 30)
    targets = awkward(sparse_of(teacher, 9), torch.Generator().manual_seed(1))
    back = SparseTargets(targets.token_ids.flip(1), targets.logprobs.flip(1), targets.log_tail)
    torch.testing.assert_close(
        eager.sparse_divergence(student, back, divergence),
        eager.sparse_divergence(student, targets, divergence),
    )


@any_divergence
def test_unused_slots_change_nothing(divergence: Divergence) -> None:
    teacher, student = pair(6, 30)
    targets = sparse_of(teacher, 9)
    wider = SparseTargets(
        F.pad(targets.token_ids, (2, 3)),
        F.pad(targets.logprobs, (2, 3), value=-math.inf),
        targets.log_tail,
    )
    torch.testing.assert_close(
        eager.sparse_divergence(student, wider, divergence),
        eager.sparse_divergence(student, targets, divergence),
    )


@any_divergence
def test_a_repeated_id_is_the_sum_of_its_slots(divergence: Divergence) -> None:
    teacher, student = pair(6, 30)
    targets = sparse_of(teacher, 9)
    split = SparseTargets(
        torch.cat([targets.token_ids, targets.token_ids[:, :2]], 1),
        torch.cat(
            [
                targets.logprobs[:, :2] + math.log(0.25),
                targets.logprobs[:, 2:],
                targets.logprobs[:, :2] + math.log(0.75),
            ],
            1,
        ),
        targets.log_tail,
    )
    torch.testing.assert_close(
        eager.sparse_divergence(student, split, divergence),
        eager.sparse_divergence(student, targets, divergence),
    )


def test_merging_keeps_distinct_targets_to_the_bit() -> None:
    targets = sparse_of(pair(6, 30)[0], 9)
    merged = merge_repeats(targets)
    order = targets.token_ids.argsort(1)
    assert torch.equal(merged.token_ids, targets.token_ids.gather(1, order))
    assert torch.equal(merged.logprobs, targets.logprobs.gather(1, order))


@any_divergence
def test_gradient_is_right(divergence: Divergence) -> None:
    _, student = pair(5, 12)
    targets = awkward(sparse_of(pair(5, 12, seed=3)[0], 5), torch.Generator().manual_seed(2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: eager.sparse_divergence(z, targets, divergence), (student,))


@any_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_finite_at_extremes(divergence: Divergence, dtype: torch.dtype, scale: float) -> None:
    teacher, student = pair(8, 40, scale=scale)
    targets = sparse_of(teacher, 6)
    targets = SparseTargets(targets.token_ids, targets.logprobs.float(), targets.log_tail.float())
    targets.log_tail[::2] = -math.inf
    targets.logprobs[0] = -math.inf
    student = student.to(dtype).requires_grad_()
    loss = eager.sparse_divergence(student, targets, divergence)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_small_tails_keep_their_digits() -> None:
    """A student tail of e^-25 is seen in float32 to 1e-5 nats, where 1 − Σ q is 0."""
    logits = torch.tensor([[30.0, 29.0, 4.0, 3.5, 3.0]])
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([-0.7]))
    exact = eager.sparse_divergence(logits.double(), targets, Divergence())
    found = eager.sparse_divergence(logits, targets, Divergence())
    assert float((found - exact).abs()) < 1e-5
    assert float(1 - logits.softmax(1)[0, :2].sum()) <= 1e-7


def test_renormalising_gives_the_rest_no_gradient_and_the_bucket_does() -> None:
    teacher, student = pair(4, 20)
    targets = sparse_of(teacher, 5)
    for tail, expected in (("renormalise", False), ("bucket", True)):
        z = student.clone().requires_grad_()
        eager.sparse_divergence(z, targets, Divergence(tail=tail)).sum().backward()
        rest = z.grad.scatter(1, targets.token_ids, 0.0)
        assert bool((rest.abs() > 1e-12).any()) == expected


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    teacher, student = pair(6, 12, scale=8.0)
    there = eager.sparse_divergence(student, sparse_of(teacher, 12), Divergence(kind="jensen_shannon"))
    back = eager.sparse_divergence(teacher, sparse_of(student, 12), Divergence(kind="jensen_shannon"))
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2)).all()


@pytest.mark.parametrize(("kind", "limit"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skew_tends_to_the_plain_divergence(kind: str, limit: str) -> None:
    teacher, student = pair(6, 12)
    targets = sparse_of(teacher, 5)
    skewed = eager.sparse_divergence(student, targets, Divergence(kind=kind, skew=1e-9))
    torch.testing.assert_close(skewed, eager.sparse_divergence(student, targets, Divergence(kind=limit)))


def test_random_draws_give_an_unbiased_forward_gradient() -> None:
    """With tail `zero` and counts / n as masses, the mean gradient over draws is the dense one."""
    g = torch.Generator().manual_seed(0)
    teacher, student = pair(1, 12)
    rows = 20_000
    drawn = torch.multinomial(teacher.softmax(1).expand(rows, -1), 8, replacement=True, generator=g)
    targets = SparseTargets(drawn, torch.full((rows, 8), -math.log(8)), torch.full((rows,), -math.inf))
    z = student.expand(rows, -1).clone().requires_grad_()
    eager.sparse_divergence(z, targets, Divergence(tail="zero")).mean().backward()
    want = student.softmax(1) - teacher.softmax(1)
    torch.testing.assert_close(z.grad.sum(0, keepdim=True), want, atol=5e-3, rtol=0)


def test_cross_entropy_skips_ignored_rows() -> None:
    _, student = pair(3, 9)
    loss = eager.cross_entropy(student, torch.tensor([4, -100, 0]))
    want = -torch.log_softmax(student, 1)[[0, 2], [4, 0]]
    torch.testing.assert_close(loss, torch.stack([want[0], torch.zeros_like(want[0]), want[1]]))


def test_padding_rows_of_the_head_take_no_part() -> None:
    hidden, head, targets = case(6, 20, 4, pad=5)
    clean = type(head)(head.weight[:20], head.bias[:20], 20)
    for got, want in zip(
        eager.head_losses(hidden, head, targets, Divergence()),
        eager.head_losses(hidden, clean, targets, Divergence()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
