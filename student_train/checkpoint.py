"""Checkpoints: all that a killed run needs to end as if it had not been.

    runs/x/checkpoints/00000400/
      weights.safetensors      every weight trained so far
      optimizer.safetensors    AdamW's moments and step counts, by weight name
      state.json               cursor, identity of the run, optimiser settings

Written under a temporary name, synced, renamed; the last two are kept. The sample order, the
learning rate and every random draw are functions of seed and step, so the cursor stands for them:
there is no generator to save. No pickle is written or read.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import TrainingError
from student_train.metrics import write_json
from student_train.model import Student
from student_train.rundir import refuse_other
from student_train.sync import sync_directory, sync_tree

KEPT = 2
"""Checkpoints left on disk."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run stands: the next step to take."""

    stage: int = 0
    """Index into the run's stages, over all levels."""
    step: int = 0
    """Next step within that stage."""
    total_steps: int = 0
    """Steps taken in the whole run."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    """Its directory."""
    cursor: Cursor
    """Where it stands."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Name the directory.

        Args:
            directory: `runs/x/checkpoints`; made when the first one is saved.
            identity: What must be equal for a run to go on from a checkpoint, as JSON.
        """
        self.directory = directory
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, or None.

        Raises:
            TrainingError: It belongs to a run with other settings; lists the differences.
        """
        found = sorted(path for path in self.directory.glob("[0-9]*") if (path / "state.json").exists())
        if not found:
            return None
        state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        refuse_other(found[-1], state["identity"], self._identity)
        return Checkpoint(found[-1], Cursor(**state["cursor"]))

    def save(self, cursor: Cursor, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Write a checkpoint atomically, then drop the oldest.

        Args:
            cursor: The next step.
            weights: Every weight trained so far, by name.
            optimizer: See `optimizer_state`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"{cursor.total_steps:08d}"
        for torn in self.directory.glob(".tmp*"):
            shutil.rmtree(torn)
        temporary = self.directory / f".tmp{os.getpid()}"
        temporary.mkdir()
        save_file(dict(weights), temporary / "weights.safetensors")
        save_file(dict(optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"cursor": asdict(cursor), "identity": self._identity})
        sync_tree(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        sync_directory(self.directory)
        for old in sorted(self.directory.glob("[0-9]*"))[:-KEPT]:
            shutil.rmtree(old)

    def forget(self) -> None:
        """Delete every checkpoint."""
        shutil.rmtree(self.directory, ignore_errors=True)


def trained_weights(student: Student, parts: Collection[str], *, keep: bool = True) -> dict[str, Tensor]:
    """Return the weights of the given parts by name, shared ones once, whole and in main memory.

    Every process calls it: sharded weights (FSDP) are gathered, one at a time.

    Args:
        student: The student.
        parts: What `Student.part_of` says of the wanted ones.
        keep: Whether this process writes them; the others only take part, and get nothing.
    """
    wanted = {
        name: value.detach() for name, value in student.named_parameters() if student.part_of(name) in parts
    }
    return gather_all(wanted, keep=keep)


def gather_all(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors one at a time into main memory, so that no device holds them all whole at once.

    One tensor under two names (a tied head) stays one.
    """
    whole: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, value in tensors.items():
        known = first.setdefault(id(value), name)
        full = gather(value.detach()) if known == name else None
        if keep:
            whole[name] = whole[known] if full is None else full.cpu()
    return whole


def gather(value: Tensor) -> Tensor:
    """Return a whole tensor: itself, or all shards of a distributed one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the device of another, sharded as that one is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module's parameters, by name.

    Raises:
        TrainingError: The module has no parameter of that name and shape.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise TrainingError(
                    f"the checkpoint holds {name} {tuple(value.shape)}, the student has no such weight"
                )
            parameters[name].copy_(shard_like(value, parameters[name]))


def optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, keep: bool = True
) -> dict[str, Tensor]:
    """Return an optimiser's tensors as `weight name|state name`, whole and in main memory.

    Every process calls it: sharded moments (FSDP) are gathered, one at a time.

    Args:
        optimizer: One that has taken a step.
        module: Whose parameters it trains.
        keep: Whether this process writes them; the others only take part, and get nothing.
    """
    names = {id(value): name for name, value in module.named_parameters()}
    moments = {
        f"{names[id(parameter)]}|{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return gather_all(moments, keep=keep)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` returned."""
    parameters = dict(module.named_parameters())
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        optimizer.state[parameter][field] = shard_like(tensor, parameter) if tensor.ndim else tensor


def load_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint's weights and optimiser tensors."""
    return (
        load_file(checkpoint.path / "weights.safetensors"),
        load_file(checkpoint.path / "optimizer.safetensors"),
    )
