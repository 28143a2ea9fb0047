"""AdamW and the learning rate, both functions of the stage alone.

rate
1 ┤   ╭──╮                warm-up, then cosine (or linear, or constant) down to 0
  │  ╱    ╲╮
0 ┼─╯       ╰──  step     the rate is computed from the step, so nothing of it needs saving
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from student_train.recipe import Stage

BALANCE_LEARNING_RATE = 1e-2
"""Peak rate of learned term weights: at the student's own 2e-5 they would not leave 1 within an epoch."""


def make_optimizer(
    module: nn.Module, stage: Stage, balance: Sequence[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """Build AdamW over what the stage trains; biases, norms and term weights do not decay.

    Args:
        module: The student, frozen for the stage already.
        stage: Learning rate, betas and decay.
        balance: Those of its parameters that weigh the terms; they learn at `BALANCE_LEARNING_RATE`.
    """
    apart = {id(value) for value in balance}
    trained = [value for value in module.parameters() if value.requires_grad and id(value) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [value for value in trained if value.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [value for value in trained if value.ndim < 2], "weight_decay": 0.0},
        {"params": list(balance), "weight_decay": 0.0, "lr": BALANCE_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=stage.learning_rate, betas=stage.betas
    )
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def learning_rate(stage: Stage, step: int, num_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        stage: Peak rate, warm-up share and shape.
        step: Step within the stage, from 0.
        num_steps: Steps of the stage.
    """
    return stage.learning_rate * rate_share(stage, step, num_steps)


def rate_share(stage: Stage, step: int, num_steps: int) -> float:
    """Return what share of its peak rate every weight learns at; see `learning_rate`."""
    rising = max(1, math.ceil(stage.warmup * num_steps)) if stage.warmup else 0
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return shapes[stage.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Let every parameter group learn at a share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
