"""AdamW and the learning rate, both functions of the stage alone.

rate
1 ┤   ╭──╮                warm-up, then cosine (or linear, or constant) down to 0
  │  ╱    ╲╮
0 ┼─╯       ╰──  step     the rate is computed from the step, so nothing of it needs saving
"""

import math

import torch
from torch import nn

from student_train.recipe import Stage


def make_optimizer(module: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """Build AdamW over what the stage trains; biases and norms do not decay.

    Args:
        module: The student, frozen for the stage already.
        stage: Learning rate, betas and decay.
    """
    trained = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in trained if value.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [value for value in trained if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=stage.learning_rate, betas=stage.betas
    )


def learning_rate(stage: Stage, step: int, num_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        stage: Peak rate, warm-up share and shape.
        step: Step within the stage, from 0.
        num_steps: Steps of the stage.
    """
    rising = max(1, math.ceil(stage.warmup * num_steps)) if stage.warmup else 0
    if step < rising:
        return stage.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return stage.learning_rate * shapes[stage.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
