"""The only door to accelerate: one process or many, on what the machine has.

    accelerate launch / torchrun ──environment──> check_sharding ──> Accelerator

    one CPU process    several CPU processes (gloo)    DDP    FSDP2

What an accelerate configuration asks for and cannot have is refused here: accelerate itself leaves FSDP
out on a CPU without a word.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from common.errors import ConfigError
from student_train.plan import Plan


def make_accelerator(plan: Plan) -> Any:
    """Start accelerate.

    Args:
        plan: Its configuration names device, precision and run directory.

    Raises:
        ConfigError: The launcher's configuration asks for what cannot be had; see `check_sharding`.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    config = plan.config
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    check_sharding(os.environ, on_cpu=on_cpu)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with="tensorboard" if config.tensorboard else None,
        project_config=ProjectConfiguration(project_dir=str(plan.out), logging_dir=str(plan.out)),
    )


def check_sharding(environment: Mapping[str, str], *, on_cpu: bool) -> None:
    """Refuse a launcher's configuration that would not be followed.

    Args:
        environment: What `accelerate launch --config_file` has set.
        on_cpu: Whether training runs on the CPU.

    Raises:
        ConfigError: It asks for DeepSpeed, for FSDP on a CPU, or for FSDP of version 1.
    """
    if _asks(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the accelerate configuration asks for DeepSpeed, whose engine keeps optimiser and gradients to "
            "itself, so a run could not be resumed; use distributed_type: FSDP with fsdp_version: 2"
        )
    if not _asks(environment, "ACCELERATE_USE_FSDP"):
        return
    if on_cpu:
        raise ConfigError(
            "the accelerate configuration asks for FSDP, which accelerate runs on GPUs only; use "
            "distributed_type: MULTI_CPU, or train where the GPUs are"
        )
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "the accelerate configuration asks for FSDP of version 1, which flattens weights and hides their "
            "names; set fsdp_version: 2"
        )


def _asks(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() == "true"
