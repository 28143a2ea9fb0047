"""What one training step sees: model inputs, and which of their rows carry which target.

Axes: B batch, T padded length, N rows, K kept tokens, P image positions, R rank.

A *row* is an index `b * T + position` into the flattened [B * T, D] hidden states, so that the head
runs only where a term needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schemas.sample import Tile

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """The teacher's cached distribution at N rows (see `common.record.TopK`)."""

    token_ids: Tensor
    """[N, K] int64 kept ids; slots with log-prob −inf are unused."""
    logprobs: Tensor
    """[N, K] float32 log-probabilities over the full vocabulary, nats."""
    log_tail: Tensor
    """[N] float32 log of the mass outside the kept ids; −inf when nothing is outside."""

    def map(self, move: Move) -> "SparseTargets":
        """Return targets of moved tensors."""
        return SparseTargets(move(self.token_ids), move(self.logprobs), move(self.log_tail))


@dataclass(frozen=True, slots=True)
class RelationTarget:
    """One image's relation factor, and the rows it speaks of."""

    rows: Tensor
    """[P] int64 rows of the image's positions, in order."""
    factor: Tensor
    """[P', R] float32 teacher factor; P' = P unless the grids differ."""
    tiles: tuple[Tile, ...]
    """The student's patch grid over `rows`."""
    teacher_tiles: tuple[Tile, ...]
    """The teacher's patch grid over the factor's rows."""

    def map(self, move: Move) -> "RelationTarget":
        """Return a target of moved tensors."""
        return replace(self, rows=move(self.rows), factor=move(self.factor))


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and targets of one micro-batch; every tensor can move to a device."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's forward: `input_ids` [B, T], `attention_mask` [B, T], pixels."""
    sample_ids: tuple[str, ...]
    """Who is in it, for messages."""
    response_rows: Tensor
    """[N] int64 rows that predict a response token."""
    response_labels: Tensor
    """[N] int64 the token each of them should predict (the data's own)."""
    response_targets: SparseTargets | None
    """The teacher's distribution at `response_rows`."""
    visual_rows: Tensor
    """[M] int64 image rows with a cached distribution."""
    visual_targets: SparseTargets | None
    """The teacher's distribution at `visual_rows`."""
    relations: tuple[RelationTarget, ...]
    """One per image that has a factor."""
    num_tokens: int
    """Real (unpadded) tokens."""
    visual_weights: Tensor | None = None
    """[M] float32 cached rows that each image row stands for, where only some were chosen; None: one each."""

    @property
    def num_positions(self) -> int:
        """Positions computed, padding included."""
        return self.inputs["input_ids"].numel()

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; the same object when it is there already."""
        if self.response_rows.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy to page-locked host memory, from which a GPU copies while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Move) -> "Batch":
        return replace(
            self,
            inputs={name: move(value) for name, value in self.inputs.items()},
            response_rows=move(self.response_rows),
            response_labels=move(self.response_labels),
            response_targets=self.response_targets and self.response_targets.map(move),
            visual_rows=move(self.visual_rows),
            visual_targets=self.visual_targets and self.visual_targets.map(move),
            relations=tuple(each.map(move) for each in self.relations),
            visual_weights=None if self.visual_weights is None else move(self.visual_weights),
        )


def without_targets(batch: Batch) -> Batch:
    """Return a batch with the same inputs that no term looks at: its loss and gradient are zero."""
    return replace(
        batch,
        response_rows=batch.response_rows[:0],
        response_labels=batch.response_labels[:0],
        response_targets=None,
        visual_rows=batch.visual_rows[:0],
        visual_targets=None,
        relations=(),
        num_tokens=0,
        visual_weights=None,
    )
