import itertools
import math

import pytest
import torch
from torch import nn

from student_train.optim import BALANCE_LEARNING_RATE, learning_rate, make_optimizer, set_learning_rate
from student_train.recipe import STAGES

STAGE = STAGES["tiny"]["sft"].model_copy(update={"learning_rate": 1.0, "warmup": 0.1})


def rates(schedule, num_steps=100):
    stage = STAGE.model_copy(update={"schedule": schedule})
    return [learning_rate(stage, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rises_over_the_warm_up_and_never_after(schedule):
    found = rates(schedule)
    assert found[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(found) == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[9:]))


def test_shapes():
    assert rates("constant")[-1] == 1.0
    assert rates("linear")[55] == pytest.approx(0.5)
    assert rates("cosine")[55] == pytest.approx(0.5)
    assert rates("cosine")[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_without_warm_up_the_first_step_is_the_peak():
    stage = STAGE.model_copy(update={"warmup": 0.0})
    assert learning_rate(stage, 0, 3) == 1.0
    assert learning_rate(stage, 0, 1) == 1.0


def test_decay_spares_biases_and_norms_and_frozen_weights_are_left_out():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    module[2].requires_grad_(False)
    optimizer = make_optimizer(module, STAGE)
    decays = {
        id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]
    }
    assert decays == {
        id(module[0].weight): 0.05,
        id(module[0].bias): 0.0,
        id(module[1].weight): 0.0,
        id(module[1].bias): 0.0,
    }
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_term_weights_learn_at_a_rate_of_their_own():
    module = nn.Linear(3, 3)
    weights = nn.Parameter(torch.zeros(2))
    module.register_parameter("balance", weights)
    stage = STAGE.model_copy(update={"learning_rate": 2e-5})
    optimizer = make_optimizer(module, stage, [weights])
    set_learning_rate(optimizer, 0.5)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert rates[id(weights)] == BALANCE_LEARNING_RATE / 2
    assert rates[id(module.weight)] == rates[id(module.bias)] == 1e-5
    assert len(rates) == 3
