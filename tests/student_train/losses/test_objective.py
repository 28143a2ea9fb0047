"""The objective: denominators, selection of rows, both implementations."""

import dataclasses

import pytest
import torch

from common.errors import ConfigError, MismatchError
from student_train.batch import Batch, RelationTarget, SparseTargets
from student_train.losses import eager
from student_train.losses.balance import UncertaintyWeights
from student_train.losses.objective import Counts, Objective, counts_of
from student_train.losses.rows import Head
from student_train.losses.terms import TERMS, Divergence, RelationTerm
from tests.student_train.losses.cases import sparse_of

V, D, T = 40, 6, 24
WEIGHTS = {"ce": 1.0, "response_kl": 0.7, "visual_kl": 0.4, "relation": 2.0}


def head(*, bias: bool = False, seed: int = 0) -> Head:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V + 3, D, generator=g, dtype=torch.float64).requires_grad_()
    return Head(weight, torch.randn(V + 3, generator=g).double().requires_grad_() if bias else None, V)


def batch(sequences: int, *, seed: int = 0) -> tuple[torch.Tensor, Batch]:
    """Sequences of 24 positions: 9 image rows and up to 5 response rows each."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, T, D, generator=g, dtype=torch.float64).requires_grad_()
    responses = torch.cat([b * T + torch.arange(14, 16 + b % 4) for b in range(sequences)])
    images = [b * T + torch.arange(2, 11) for b in range(sequences)]
    visual = torch.cat([rows[::2] for rows in images])

    def targets(rows: torch.Tensor, k: int) -> SparseTargets:
        return sparse_of(3 * torch.randn(len(rows), V, generator=g, dtype=torch.float64), k)

    return hidden, Batch(
        inputs={},
        sample_ids=tuple(f"s{b}" for b in range(sequences)),
        response_rows=responses,
        response_labels=torch.randint(V, (len(responses),), generator=g),
        response_targets=targets(responses, 8),
        visual_rows=visual,
        visual_targets=targets(visual, 3),
        relations=tuple(
            RelationTarget(rows, torch.randn(9, 4, generator=g).double(), (), ()) for rows in images
        ),
        num_tokens=sequences * T,
    )


def sub_batch(whole: Batch, sequences: range) -> Batch:
    """The part of a batch that lies in some of its sequences, rows renumbered."""
    low, high = sequences.start * T, sequences.stop * T

    def pick(rows: torch.Tensor, targets: SparseTargets) -> tuple[torch.Tensor, SparseTargets, torch.Tensor]:
        inside = (rows >= low) & (rows < high)
        kept = (targets.token_ids[inside], targets.logprobs[inside], targets.log_tail[inside])
        return rows[inside] - low, SparseTargets(*kept), inside

    responses, response_targets, inside = pick(whole.response_rows, whole.response_targets)
    visual, visual_targets, _ = pick(whole.visual_rows, whole.visual_targets)
    return dataclasses.replace(
        whole,
        response_rows=responses,
        response_labels=whole.response_labels[inside],
        response_targets=response_targets,
        visual_rows=visual,
        visual_targets=visual_targets,
        relations=tuple(
            dataclasses.replace(target, rows=target.rows - low)
            for target in whole.relations
            if low <= int(target.rows[0]) < high
        ),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divergence", [Divergence(), Divergence(kind="jensen_shannon", temperature=2.0)])
def test_fused_equals_eager(bias: bool, divergence: Divergence) -> None:
    found = []
    for implementation in ("fused", "eager"):
        lm_head = head(bias=bias)
        hidden, data = batch(4)
        objective = Objective(WEIGHTS, divergence=divergence, implementation=implementation)
        outcome = objective(hidden, lm_head, data)
        outcome.loss.backward()
        grads = [hidden.grad, lm_head.weight.grad] + ([lm_head.bias.grad] if bias else [])
        found.append((outcome.loss.detach(), outcome.raw, outcome.weighted, grads))
    torch.testing.assert_close(*found)


def test_terms_are_the_definitions() -> None:
    hidden, data = batch(4)
    lm_head = head()
    outcome = Objective(WEIGHTS)(hidden, lm_head, data)
    logits = hidden.flatten(0, 1) @ lm_head.weight[:V].T
    ce = torch.nn.functional.cross_entropy(logits[data.response_rows], data.response_labels)
    response = eager.sparse_divergence(logits[data.response_rows], data.response_targets, Divergence()).mean()
    visual = eager.sparse_divergence(logits[data.visual_rows], data.visual_targets, Divergence()).mean()
    distances = []
    for target in data.relations:
        student, teacher = (z @ z.T for z in (logits[target.rows], target.factor))
        distances.append(1 - torch.cosine_similarity(student.flatten(), teacher.flatten(), dim=0))
    wanted = dict(zip(TERMS, (ce, response, visual, torch.stack(distances).mean()), strict=True))
    torch.testing.assert_close(outcome.raw, {term: value.detach() for term, value in wanted.items()})
    loss = sum(WEIGHTS[term] * wanted[term] for term in TERMS)
    torch.testing.assert_close(outcome.loss, loss)
    leaves = [hidden, lm_head.weight]
    torch.testing.assert_close(
        torch.autograd.grad(outcome.loss, leaves), torch.autograd.grad(loss, leaves, retain_graph=True)
    )
    torch.testing.assert_close(outcome.weighted, {t: WEIGHTS[t] * wanted[t].detach() for t in TERMS})


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_micro_batches_add_up_to_one_big_batch(implementation: str) -> None:
    hidden, whole = batch(5)
    lm_head = head()
    objective = Objective(WEIGHTS, implementation=implementation)
    want = objective(hidden, lm_head, whole)
    leaves = [hidden, lm_head.weight]
    want_grads = torch.autograd.grad(want.loss, leaves)
    counts = counts_of(whole)
    parts = []
    for sequences in (range(2), range(2, 5)):
        part = sub_batch(whole, sequences)
        outcome = objective(hidden[sequences.start : sequences.stop], lm_head, part, counts)
        outcome.loss.backward()
        parts.append(outcome)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(want_grads))
    for term in TERMS:
        torch.testing.assert_close(sum(part.raw[term] for part in parts), want.raw[term])


def test_averaged_ranks_add_up_with_counts_divided_by_ranks() -> None:
    hidden, whole = batch(4)
    lm_head = head()
    objective = Objective(WEIGHTS)
    (want,) = torch.autograd.grad(objective(hidden, lm_head, whole).loss, lm_head.weight)
    counts = Counts(*(count / 2 for count in counts_of(whole)))
    ranks = []
    for sequences in (range(1), range(1, 4)):
        loss = objective(
            hidden[sequences.start : sequences.stop], lm_head, sub_batch(whole, sequences), counts
        ).loss
        ranks.append(torch.autograd.grad(loss, lm_head.weight)[0])
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, want)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_terms_without_weight_cost_no_head_rows(implementation: str, monkeypatch) -> None:
    rows = []
    for module in (eager, __import__("student_train.losses.fused", fromlist=["fused"])):
        walk = module.head_losses

        def counted(hidden, *args, _walk=walk, **kwargs):
            rows.append(hidden.shape[0])
            return _walk(hidden, *args, **kwargs)

        monkeypatch.setattr(module, "head_losses", counted)
    hidden, data = batch(4)
    num_responses, num_visual = len(data.response_rows), len(data.visual_rows)
    for weights, expected in (
        ({"ce": 1.0}, [num_responses]),
        ({"visual_kl": 1.0}, [num_visual]),
        ({"ce": 1.0, "visual_kl": 1.0}, [num_responses + num_visual]),
        ({"relation": 1.0}, []),
        ({}, []),
    ):
        rows.clear()
        outcome = Objective(weights, implementation=implementation)(hidden, head(), data)
        assert rows == expected
        assert set(outcome.raw) == set(weights)
        outcome.loss.backward()


def test_ce_alone_needs_no_cache() -> None:
    hidden, data = batch(3)
    plain = dataclasses.replace(data, response_targets=None, visual_targets=None, relations=())
    outcome = Objective({"ce": 1.0})(hidden, head(), plain)
    torch.testing.assert_close(outcome.raw, Objective({"ce": 1.0})(hidden, head(), data).raw)


def test_a_batch_without_images_has_no_visual_terms() -> None:
    hidden, data = batch(3)
    plain = dataclasses.replace(data, visual_rows=data.visual_rows[:0], visual_targets=None, relations=())
    outcome = Objective(WEIGHTS)(hidden, head(), plain)
    assert set(outcome.raw) == {"ce", "response_kl"}


def test_an_empty_batch_still_reaches_the_parameters() -> None:
    """Under data parallel every rank must run backward, whatever its share holds."""
    hidden, data = batch(1)
    nothing = dataclasses.replace(
        data,
        response_rows=data.response_rows[:0],
        response_labels=data.response_labels[:0],
        visual_rows=data.visual_rows[:0],
        relations=(),
    )
    lm_head = head(bias=True)
    outcome = Objective(WEIGHTS)(hidden, lm_head, nothing, Counts(4, 4, 4))
    outcome.loss.backward()
    assert float(outcome.loss.detach()) == 0
    assert all(leaf.grad.eq(0).all() for leaf in (hidden, lm_head.weight, lm_head.bias))


def test_gram_of_a_frozen_head_is_kept_until_the_head_changes(monkeypatch) -> None:
    from student_train.losses import objective as module

    calls = []
    monkeypatch.setattr(module, "head_gram", lambda h, _real=module.head_gram: (calls.append(1), _real(h))[1])
    hidden, data = batch(3)
    frozen = Head(head().weight.detach(), None, V)
    objective = Objective({"relation": 1.0})
    first = objective(hidden, frozen, data).raw["relation"]
    objective(hidden, frozen, data)
    assert len(calls) == 1
    frozen.weight[:, 0] *= 3
    second = objective(hidden, frozen, data).raw["relation"]
    assert len(calls) == 2
    assert not torch.allclose(first, second)


def test_relation_of_hidden_ignores_the_head() -> None:
    hidden, data = batch(3)
    objective = Objective({"relation": 1.0}, relation=RelationTerm(of="hidden"))
    values = [objective(hidden, head(seed=seed), data).raw["relation"] for seed in (0, 1)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"weight of ce is {weight}"):
        Objective({"ce": weight})


def test_missing_targets_and_foreign_ids_are_refused() -> None:
    hidden, data = batch(2)
    with pytest.raises(MismatchError, match="visual_kl has a weight, but the cache holds no"):
        Objective(WEIGHTS)(hidden, head(), dataclasses.replace(data, visual_targets=None))
    data.response_targets.token_ids[0, 0] = V
    with pytest.raises(MismatchError, match="one of the samples s0, s1 holds token id 40"):
        Objective(WEIGHTS)(hidden, head(), data)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_learned_weights_have_the_gradient_of_their_definition(implementation: str) -> None:
    hidden, data = batch(4)
    balance = UncertaintyWeights(["response_kl", "relation"]).double()
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([0.3, -1.2]))
    lm_head = head()
    outcome = Objective(WEIGHTS, implementation=implementation, balance=balance)(hidden, lm_head, data)
    found = torch.autograd.grad(outcome.loss, [hidden, lm_head.weight, balance.log_variance])

    each = {
        term: Objective({term: 1.0}, implementation="eager")(hidden, lm_head, data).loss for term in TERMS
    }
    learned = dict(zip(balance.terms, balance.log_variance, strict=True))
    want = sum(
        WEIGHTS[term] * ((-learned[term]).exp() * value + learned[term] if term in learned else value)
        for term, value in each.items()
    )
    torch.testing.assert_close(outcome.loss, want)
    wanted = torch.autograd.grad(want, [hidden, lm_head.weight, balance.log_variance])
    torch.testing.assert_close(found, wanted)


def test_learned_weights_count_once_however_a_step_is_split() -> None:
    hidden, whole = batch(5)
    lm_head, balance = head(), UncertaintyWeights(TERMS).double()
    objective = Objective(WEIGHTS, balance=balance)
    with torch.no_grad():
        balance.log_variance.normal_()
    (want,) = torch.autograd.grad(objective(hidden, lm_head, whole).loss, balance.log_variance)
    for sequences in (range(2), range(2, 5)):
        part = hidden[sequences.start : sequences.stop]
        objective(part, lm_head, sub_batch(whole, sequences), counts_of(whole)).loss.backward()
    torch.testing.assert_close(balance.log_variance.grad, want)


def test_gradient_norms_say_how_hard_each_term_pulls() -> None:
    hidden, data = batch(4)
    lm_head = head(bias=True)
    norms = Objective(WEIGHTS).gradient_norms(hidden, lm_head, data)
    for term in TERMS:
        alone = Objective({term: WEIGHTS[term]}, implementation="eager")(hidden, lm_head, data)
        torch.testing.assert_close(norms[term], torch.autograd.grad(alone.loss, hidden)[0].norm())
    assert hidden.grad is None
    assert lm_head.weight.grad is None
