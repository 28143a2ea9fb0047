"""Cross-entropy and sparse divergence of all rows in one walk over the head; no [N, V] tensor, ever.

Axes: N rows, D width, V real vocabulary; n rows and v vocabulary entries at a time.

    by rows         for n rows: logits [n, V], losses, dL/dz in place, pulled through the head at once.
                    Three matrix products a row (two under a frozen head), like the naive loss.
    by vocabulary   forward: streaming softmax over [N, v]; backward: the logits again, then dL/dz.
                    Four products (three), the least memory, and no gradient held in between.

Both equal `eager.head_losses`. Values and gradients are linear in the coefficients, so any weighting,
mean or accumulation is data. Only `total` carries a gradient, once: a second derivative is refused.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.losses.passes import ByRows, ByVocabulary, Walk, make_job
from student_train.losses.rows import Head, RowLosses, RowTargets, labels_only, targets_only
from student_train.losses.terms import IGNORE_LABEL, Divergence

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 640 * 2**20}
"""Float32 logits held at a time on each kind of device when nobody says otherwise.

A chunk of n rows reads the head for 6 n V D operations: on a GPU that does some 250 operations in the
time of one byte, fewer than about 1,000 rows (600 MB at V = 151,936) would wait for memory.
"""


def by_rows(num_columns: int, device: str = "cpu", *, budget_bytes: int | None = None) -> Walk:
    """Plan chunks whose [n, V] float32 logits fit the budget, `CHUNK_BYTES` of the device unless given."""
    budget_bytes = budget_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return Walk(max(16, budget_bytes // (4 * num_columns)), None)


def by_vocabulary(num_rows: int, device: str = "cpu", *, budget_bytes: int | None = None) -> Walk:
    """Plan blocks whose [N, v] float32 logits fit the budget, `CHUNK_BYTES` of the device unless given."""
    budget_bytes = budget_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return Walk(max(1, num_rows), max(256, budget_bytes // (4 * max(1, num_rows))))


def head_losses(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: RowTargets,
    divergence: Divergence,
    *,
    walk: Walk | None = None,
) -> RowLosses:
    """Equal `eager.head_losses`, with memory for a few rows of logits.

    Args:
        hidden: Final hidden states of the rows, after the last norm.
        head: Only its real rows take part; gradients reach weight and bias if they want them.
        targets: Labels, teacher and coefficients of the rows; no gradient reaches them.
        divergence: What separates student and teacher. At a temperature other than 1, rows with a
            label meet the head twice.
        walk: Chunk shape; by rows within `CHUNK_BYTES` unless given.
    """
    if divergence.temperature == 1.0:
        return _walk_head(hidden, head, targets, divergence, walk)
    labelled = (targets.labels != IGNORE_LABEL).nonzero()[:, 0]
    hard = labels_only(targets.labels[labelled], targets.ce_coef[labelled])
    at_one = _walk_head(hidden[labelled], head, hard, divergence, walk)
    soft = targets_only(targets.sparse, targets.kl_coef)
    at_temperature = _walk_head(hidden, head, soft, divergence, walk, scale=1 / divergence.temperature)
    ce = torch.zeros_like(at_temperature.ce).index_copy(0, labelled, at_one.ce)
    return RowLosses(at_one.total + at_temperature.total, ce, at_temperature.kl)


def _walk_head(
    hidden: Tensor,
    head: Head,
    targets: RowTargets,
    divergence: Divergence,
    walk: Walk | None,
    *,
    scale: float = 1.0,
) -> RowLosses:
    dtype, device = head.weight.dtype, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    parts = [None if part is None else part.to(dtype) for part in (hidden, head.weight, head.bias)]
    learns = torch.is_grad_enabled()
    wants = [learns and part is not None and part.requires_grad for part in parts]
    job = make_job(
        targets,
        head.vocab_size,
        divergence,
        walk or by_rows(head.vocab_size, device),
        dtype=torch.promote_types(dtype, torch.float32),
        scale=scale,
        wants=(wants[0], wants[1], wants[2]),
    )
    function = ByRows if job.walk.columns is None else ByVocabulary
    return RowLosses(*function.apply(*parts, job))  # type: ignore[no-untyped-call]
