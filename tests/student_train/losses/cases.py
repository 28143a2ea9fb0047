"""Random heads, hidden states and targets with every awkward slot in them."""

import torch

from student_train.batch import SparseTargets
from student_train.losses.rows import Head, RowTargets
from student_train.losses.terms import IGNORE_LABEL, Divergence

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")
TAILS = ("bucket", "renormalise", "zero")


def divergences() -> list[Divergence]:
    return [Divergence(kind=kind, tail=tail) for kind in KINDS for tail in TAILS]


def sparse_of(logits: torch.Tensor, k: int, *, temperature: float = 1.0) -> SparseTargets:
    """The cache's view of a teacher that has these logits."""
    logprobs = torch.log_softmax(logits.double() / temperature, dim=1)
    top, ids = logprobs.topk(k, dim=1)
    rest = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
    return SparseTargets(ids, top, rest)


def awkward(targets: SparseTargets, generator: torch.Generator) -> SparseTargets:
    """Shuffle slots, leave some unused, repeat some ids, empty some tails."""
    n, k = targets.token_ids.shape
    order = torch.rand(n, k, generator=generator).argsort(1)
    ids, logprobs = targets.token_ids.gather(1, order), targets.logprobs.gather(1, order)
    unused = torch.rand(n, k, generator=generator) < 0.2
    ids, logprobs = ids.masked_fill(unused, 0), logprobs.masked_fill(unused, -torch.inf)
    if k > 2:
        ids[::3, 1] = ids[::3, 2]
    log_tail = targets.log_tail.clone()
    log_tail[1::4] = -torch.inf
    return SparseTargets(ids, logprobs, log_tail)


def case(
    n: int,
    v: int,
    k: int,
    *,
    seed: int = 0,
    width: int = 7,
    pad: int = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, Head, RowTargets]:
    """Hidden states [n, width], a head padded by `pad` rows, and targets for all rows."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64)
    weight = torch.randn(v + pad, width, generator=g, dtype=torch.float64)
    offset = torch.randn(v + pad, generator=g, dtype=torch.float64) if bias else None
    teacher = 3 * torch.randn(n, v, generator=g, dtype=torch.float64)
    labels = torch.randint(v, (n,), generator=g)
    labels[::2] = IGNORE_LABEL
    head = Head(
        weight.to(dtype).requires_grad_(),
        None if offset is None else offset.to(dtype).requires_grad_(),
        v,
    )
    targets = RowTargets(
        labels,
        awkward(sparse_of(teacher, k), g),
        torch.rand(n, generator=g, dtype=torch.float64),
        torch.rand(n, generator=g, dtype=torch.float64),
    )
    return hidden.to(dtype).requires_grad_(), head, targets
