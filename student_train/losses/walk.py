"""One chunk of rows on its way over the vocabulary: streaming softmax, then the gradient in closed form.

Axes: n rows of the chunk, K kept tokens, v vocabulary entries of a block.

    absorb(block) ...   exp(z − peak) of what is not kept, its running sum, kept and label logits
    finish()            the K + 1 bucket log-probs, the losses, their gradient g on the buckets
    gradient(block)     dL/dz, written over the block

With q_tail the student's mass outside the kept ids and G = Σ g, every divergence pulls back to

    dL/dz_j = (g_tail − G q_tail) exp(z_j − lse_rest)     j not kept
    dL/dz_k = g_k − G q_k                                 k kept

and cross-entropy adds q_j − [j = label]. All factors are bounded, however small the tail.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.batch import SparseTargets
from student_train.losses.rows import RowTargets
from student_train.losses.sparse import bucket_divergence
from student_train.losses.terms import IGNORE_LABEL, Divergence


class RowWalk:
    """Softmax statistics and gradients of n rows, fed with blocks of logits in any order."""

    def __init__(self, targets: RowTargets, dtype: torch.dtype) -> None:
        """Start with nothing absorbed.

        Args:
            targets: The rows' targets, repeats merged.
            dtype: Precision of statistics and gradients.
        """
        ids = targets.sparse.token_ids
        self._targets = targets
        self._kept = targets.sparse.logprobs > -torch.inf
        self._peak = ids.new_full(ids.shape[:1], torch.finfo(dtype).min, dtype=dtype)
        self._mass = torch.zeros_like(self._peak)
        self._kept_logits = torch.zeros_like(ids, dtype=dtype)
        self._label_logits = torch.zeros_like(self._peak)
        self._dense, self._at_kept = self._mass, self._kept_logits

    def absorb(self, logits: Float[Tensor, "n v"], start: int) -> None:
        """Add a block of logits; leaves exp(logit − peak so far) in it, 0 at the kept ids."""
        column, inside = _columns(self._targets.labels[:, None], start, logits.shape[1])
        self._label_logits += (logits.gather(1, column) * inside).squeeze(1)
        column, inside = self._kept_columns(start, logits.shape[1])
        self._kept_logits += torch.where(inside, logits.gather(1, column), 0)
        _blot(logits, column, inside)
        peak = torch.maximum(self._peak, logits.amax(dim=1))
        logits.sub_(peak[:, None]).exp_()
        self._mass = self._mass * (self._peak - peak).exp() + logits.sum(dim=1)
        self._peak = peak

    def finish(
        self, divergence: Divergence, want_gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Close the softmax and return (cross-entropy, divergence) of each row in nats."""
        rest = self._peak + self._mass.log()
        kept = self._kept_logits.masked_fill(~self._kept, -torch.inf)
        total = torch.cat([kept, rest[:, None]], dim=1).logsumexp(dim=1)
        ce = (total - self._label_logits) * (self._targets.labels != IGNORE_LABEL)
        student = torch.cat([self._kept_logits, rest[:, None]], dim=1) - total[:, None]
        with torch.set_grad_enabled(want_gradient):
            student.requires_grad_(want_gradient)
            kl = bucket_divergence(self._targets.sparse, student, divergence)
            if want_gradient:
                (pull,) = torch.autograd.grad((kl * self._targets.kl_coef).sum(), student)
                self._spread(pull, student.detach().exp())
        return ce, kl.detach()

    def reweigh(self, logits: Float[Tensor, "n v"], start: int) -> None:
        """Write exp(logit − peak) over a block met again, 0 at the kept ids."""
        _blot(logits, *self._kept_columns(start, logits.shape[1]))
        logits.sub_(self._peak[:, None]).exp_()

    def gradient(self, masses: Float[Tensor, "n v"], start: int, scale: float) -> None:
        """Write scale · dL/dz over a block of exp(logit − peak)."""
        masses.mul_((self._dense * scale)[:, None])
        column, inside = self._kept_columns(start, masses.shape[1])
        masses.scatter_add_(1, column, self._at_kept * inside * scale)
        column, inside = _columns(self._targets.labels[:, None], start, masses.shape[1])
        masses.scatter_add_(1, column, inside * self._targets.ce_coef[:, None] * -scale)

    def _spread(self, pull: Float[Tensor, "n C"], masses: Float[Tensor, "n C"]) -> None:
        pull, masses = pull * self._used(), masses * self._used()
        ce_coef = self._targets.ce_coef * (self._targets.labels != IGNORE_LABEL)
        spread = pull + (ce_coef - pull.sum(dim=1))[:, None] * masses
        self._dense = spread[:, -1] / self._mass.clamp(min=1)
        self._at_kept = spread[:, :-1]

    def _used(self) -> Tensor:
        return torch.cat([self._kept, self._kept.new_ones(self._kept.shape[0], 1)], dim=1)

    def _kept_columns(self, start: int, width: int) -> tuple[Tensor, Tensor]:
        column, inside = _columns(self._targets.sparse.token_ids, start, width)
        return column, inside & self._kept


def _columns(ids: Int[Tensor, "n K"], start: int, width: int) -> tuple[Tensor, Tensor]:
    column = ids - start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _blot(logits: Float[Tensor, "n v"], column: Int[Tensor, "n K"], inside: Tensor) -> None:
    """Write −inf at the kept ids; slots outside touch nothing."""
    wall = torch.where(inside, -torch.inf, torch.inf).to(logits.dtype)
    logits.scatter_reduce_(1, column, wall, "amin")


def slice_rows(targets: RowTargets, rows: slice) -> RowTargets:
    """Return the targets of a run of rows (views)."""
    sparse = targets.sparse
    return RowTargets(
        targets.labels[rows],
        SparseTargets(sparse.token_ids[rows], sparse.logprobs[rows], sparse.log_tail[rows]),
        targets.ce_coef[rows],
        targets.kl_coef[rows],
    )
