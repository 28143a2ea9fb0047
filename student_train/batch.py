"""What one training step sees: model inputs, and which of their rows carry which target.

Axes: B batch, T padded length, N rows, K kept tokens, P image positions, R rank.

A *row* is an index `b * T + position` into the flattened [B * T, D] hidden states, so that the head
runs only where a term needs it.
"""

from dataclasses import dataclass

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
