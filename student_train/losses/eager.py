"""The definition of every row loss, written to be read. `fused.py` must equal it; tests hold them together.

Axes: N rows, D width, V vocabulary, K kept tokens.

Everything after the logits is computed in float32 (float64 for float64 logits). The student's log tail
mass is the logsumexp of the logits outside the kept ids, so its absolute error is that of one logsumexp,
about 1e-6 nats at |logit| ≤ 30 in float32, however small the tail is; log(1 − Σ q_k) would have no
correct digit left once the tail is below 1e-7.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from student_train.batch import SparseTargets
from student_train.losses.rows import Head, RowLosses, RowTargets
from student_train.losses.sparse import bucket_divergence, merge_repeats
from student_train.losses.terms import IGNORE_LABEL, Divergence


def cross_entropy(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return −log softmax(logits)[label] in nats, 0 where the label is −100."""
    return F.cross_entropy(_precise(logits), labels, ignore_index=IGNORE_LABEL, reduction="none")


def sparse_divergence(
    logits: Float[Tensor, "N V"],
    targets: SparseTargets,
    divergence: Divergence,
) -> Float[Tensor, " N"]:
    """Divergence in nats between the cached teacher p and q = softmax(logits / temperature).

    With `forward_kl` and the tail bucket:
        Σ_k p_k (log p_k − log q_k) + p_tail (log p_tail − log q_tail)
    Never exceeds the dense divergence; equals it when K = V. Zero when the student is the teacher.
    A repeated id is one id whose teacher mass is the sum of its slots. Where the kept ids are the whole
    vocabulary there is no tail. With `reverse_kl` an empty teacher tail counts as e^-100.
    """
    targets = merge_repeats(targets)
    log_q = torch.log_softmax(_precise(logits) / divergence.temperature, dim=1)
    kept = targets.logprobs > -torch.inf
    outside = torch.ones_like(log_q).scatter_reduce(1, targets.token_ids, (~kept).to(log_q.dtype), "amin") > 0
    some = outside.any(dim=1)
    rest = torch.where(outside | ~some[:, None], log_q, -torch.inf).logsumexp(dim=1)
    tail = torch.where(some, rest, -torch.inf)
    student = torch.cat([log_q.gather(1, targets.token_ids), tail[:, None]], dim=1)
    return bucket_divergence(targets, student, divergence)


def head_losses(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: RowTargets,
    divergence: Divergence,
) -> RowLosses:
    """Cross-entropy and divergence of every row through the full [N, vocab_size] logits.

    Args:
        hidden: Final hidden states of the rows, after the last norm.
        head: Only its real rows take part.
        targets: Labels, teacher and coefficients of the rows.
        divergence: What separates student and teacher.
    """
    weight, bias = head.real()
    logits = F.linear(hidden.to(weight.dtype), weight, bias)
    ce = cross_entropy(logits, targets.labels)
    kl = sparse_divergence(logits, targets.sparse, divergence)
    total = (targets.ce_coef * ce).sum() + (targets.kl_coef * kl).sum()
    return RowLosses(total, ce.detach(), kl.detach())


def _precise(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
