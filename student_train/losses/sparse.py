"""The divergence between two distributions over K kept ids and one bucket for all the rest.

Axes: N rows, K kept tokens, C = K + 1 buckets.

    teacher   p_1 ... p_K   p_tail       from the cache; slots with log-prob −inf are unused
    student   q_1 ... q_K   q_tail       q_tail = mass outside the kept ids, from their own logsumexp

Eager and fused both end here, on [N, C] tensors; what differs is how they get q.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from student_train.batch import SparseTargets
from student_train.losses.terms import Divergence

LOG_MASS_FLOOR = -100.0
"""Log mass below which a teacher's bucket counts as empty: float32's least positive number is e^-103."""


def merge_repeats(targets: SparseTargets) -> SparseTargets:
    """Add up the masses of repeated ids; each id then stands in one slot, the others are unused.

    Kept slots come first, in order of id; unused slots hold id 0 and log-prob −inf.
    """
    unused = targets.logprobs == -torch.inf
    last = torch.iinfo(torch.int64).max
    ids, order = targets.token_ids.masked_fill(unused, last).sort(dim=1)
    logprobs = targets.logprobs.gather(1, order)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = starts.cumsum(1) - 1
    peak = torch.full_like(logprobs, -torch.inf).scatter_reduce(1, slot, logprobs, "amax")
    share = (logprobs - peak.gather(1, slot)).nan_to_num(nan=-torch.inf, neginf=-torch.inf).exp()
    merged = peak + torch.zeros_like(logprobs).scatter_add(1, slot, share).log()
    empty = peak == -torch.inf
    return SparseTargets(
        token_ids=torch.zeros_like(ids).scatter(1, slot, ids).masked_fill(empty, 0),
        logprobs=merged.masked_fill(empty, -torch.inf),
        log_tail=targets.log_tail,
    )


def bucket_divergence(
    targets: SparseTargets,
    student: Float[Tensor, "N C"],
    divergence: Divergence,
) -> Float[Tensor, " N"]:
    """Divergence of each row in nats, ≥ 0 but for `tail = "zero"`.

    Args:
        targets: Teacher [N, K] with distinct ids (see `merge_repeats`).
        student: Log-probs [N, K + 1] at the kept ids and, last, of everything else; −inf there when
            nothing else exists, which leaves the tail out on both sides.
        divergence: Kind, tail, β and λ; the temperature has been applied already.
    """
    teacher = torch.cat([targets.logprobs, targets.log_tail[:, None]], dim=1).to(student.dtype)
    used = teacher > -torch.inf
    used[:, -1] = (student[:, -1] > -torch.inf) & (divergence.tail == "bucket")
    log_p = torch.where(used, teacher, -torch.inf)
    log_q = torch.where(used, student, -torch.inf)
    if divergence.tail == "renormalise":
        log_p, log_q = _normalise(log_p, used), _normalise(log_q, used)
    log_p = log_p.masked_fill(~used, 0.0).clamp(min=LOG_MASS_FLOOR)
    log_q = log_q.masked_fill(~used, 0.0)
    return (_KINDS[divergence.kind](log_p, log_q, divergence) * used).sum(dim=1)


def _normalise(log_mass: Float[Tensor, "N C"], used: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    some = used.any(dim=1, keepdim=True)
    total = torch.where(some, log_mass, 0.0).logsumexp(dim=1, keepdim=True)
    return log_mass - total


def _forward(p: Tensor, q: Tensor, _: Divergence) -> Tensor:
    return p.exp() * (p - q)


def _reverse(p: Tensor, q: Tensor, _: Divergence) -> Tensor:
    return q.exp() * (q - p)


def _jensen_shannon(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    beta = divergence.beta
    mixture = _mix(p, q, beta)
    return beta * p.exp() * (p - mixture) + (1 - beta) * q.exp() * (q - mixture)


def _skew(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    return p.exp() * (p - _mix(p, q, divergence.skew))


def _skew_reverse(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    return q.exp() * (q - _mix(q, p, divergence.skew))


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return log(share · e^first + (1 − share) · e^second)."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


_KINDS: dict[str, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jensen_shannon": _jensen_shannon,
    "skew_kl": _skew,
    "skew_reverse_kl": _skew_reverse,
}
