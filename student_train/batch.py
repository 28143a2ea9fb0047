"""What one training step sees: model inputs, and which of their rows carry which target.

Axes: B batch, T padded length, N rows, K kept tokens, P image positions, R rank.

A *row* is an index `b * T + position` into the flattened [B * T, D] hidden states, so that the head
runs only where a term needs it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schemas.sample import Tile


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """The teacher's cached distribution at N rows (see `common.record.TopK`)."""

    token_ids: Tensor
    """[N, K] int64 kept ids; slots with log-prob −inf are unused."""
    logprobs: Tensor
    """[N, K] float32 log-probabilities over the full vocabulary, nats."""
    log_tail: Tensor
    """[N] float32 log of the mass outside the kept ids; −inf when nothing is outside."""

    def to(self, device: torch.device) -> "SparseTargets":
        """Copy to a device."""
        return SparseTargets(
            self.token_ids.to(device, non_blocking=True),
            self.logprobs.to(device, non_blocking=True),
            self.log_tail.to(device, non_blocking=True),
        )


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

    def to(self, device: torch.device) -> "RelationTarget":
        """Copy to a device."""
        rows, factor = (each.to(device, non_blocking=True) for each in (self.rows, self.factor))
        return replace(self, rows=rows, factor=factor)


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

    @property
    def num_positions(self) -> int:
        """Positions computed, padding included."""
        return self.inputs["input_ids"].numel()

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; the same object when it is there already."""
        if self.response_rows.device == device:
            return self
        move = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(
            self,
            inputs=move,
            response_rows=self.response_rows.to(device, non_blocking=True),
            response_labels=self.response_labels.to(device, non_blocking=True),
            response_targets=self.response_targets and self.response_targets.to(device),
            visual_rows=self.visual_rows.to(device, non_blocking=True),
            visual_targets=self.visual_targets and self.visual_targets.to(device),
            relations=tuple(each.to(device) for each in self.relations),
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
    )
