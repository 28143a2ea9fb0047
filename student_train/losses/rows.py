"""What a walk over the language-model head takes and gives.

Axes: N rows, D width, V head rows, K kept tokens.

    hidden [N, D] ─┐
    Head           ├─ eager.head_losses / fused.head_losses ─> RowLosses
    RowTargets  ───┘
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from student_train.batch import SparseTargets
from student_train.losses.terms import IGNORE_LABEL


@dataclass(frozen=True, slots=True)
class Head:
    """The matrix that turns hidden states into logits, tied to the embedding or not."""

    weight: Float[Tensor, "V D"]
    """Rows of the head; only the first `vocab_size` are real tokens."""
    bias: Float[Tensor, " V"] | None
    """Bias of the head, if it has one."""
    vocab_size: int
    """Real tokens: rows at and above it pad the head and take no part."""

    def real(self) -> tuple[Tensor, Tensor | None]:
        """Weight [vocab_size, D] and bias [vocab_size] without the padding rows (views)."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return self.weight[: self.vocab_size], bias


@dataclass(frozen=True, slots=True)
class RowTargets:
    """What each row should say, and how much each row counts."""

    labels: Int[Tensor, " N"]
    """Token to predict, −100 for rows without cross-entropy."""
    sparse: SparseTargets
    """The teacher at the rows; K may be 0."""
    ce_coef: Float[Tensor, " N"]
    """Factor of each row's cross-entropy in the total."""
    kl_coef: Float[Tensor, " N"]
    """Factor of each row's divergence in the total."""


class RowLosses(NamedTuple):
    """The weighted sum over rows, and each row's own values."""

    total: Float[Tensor, ""]
    """Σ ce_coef · ce + kl_coef · kl; the only output that carries a gradient."""
    ce: Float[Tensor, " N"]
    """Cross-entropy of each row in nats, detached; 0 where the label is −100."""
    kl: Float[Tensor, " N"]
    """Divergence of each row in nats, detached."""


def no_targets(num_rows: int, device: torch.device) -> SparseTargets:
    """Targets without kept ids, whose divergence is 0: for rows that only have a label."""
    return SparseTargets(
        token_ids=torch.zeros(num_rows, 0, dtype=torch.int64, device=device),
        logprobs=torch.zeros(num_rows, 0, device=device),
        log_tail=torch.zeros(num_rows, device=device),
    )


def labels_only(labels: Int[Tensor, " N"], ce_coef: Float[Tensor, " N"]) -> RowTargets:
    """Cross-entropy alone, at the given rows."""
    sparse = no_targets(labels.shape[0], labels.device)
    return RowTargets(labels, sparse, ce_coef, torch.zeros_like(ce_coef))


def targets_only(sparse: SparseTargets, kl_coef: Float[Tensor, " N"]) -> RowTargets:
    """Divergence alone, at the given rows."""
    labels = torch.full_like(sparse.log_tail, IGNORE_LABEL, dtype=torch.int64)
    return RowTargets(labels, sparse, torch.zeros_like(kl_coef), kl_coef)


def concat_targets(parts: Sequence[RowTargets]) -> RowTargets:
    """Stack the targets of several runs of rows; the smaller K is filled with unused slots."""
    width = max(part.sparse.token_ids.shape[1] for part in parts)
    sparse = [_widen(part.sparse, width) for part in parts]
    return RowTargets(
        torch.cat([part.labels for part in parts]),
        SparseTargets(
            torch.cat([part.token_ids for part in sparse]),
            torch.cat([part.logprobs for part in sparse]),
            torch.cat([part.log_tail for part in sparse]),
        ),
        torch.cat([part.ce_coef for part in parts]),
        torch.cat([part.kl_coef for part in parts]),
    )


def _widen(sparse: SparseTargets, width: int) -> SparseTargets:
    more = (0, width - sparse.token_ids.shape[1])
    return SparseTargets(
        F.pad(sparse.token_ids, more),
        F.pad(sparse.logprobs, more, value=-torch.inf),
        sparse.log_tail,
    )
