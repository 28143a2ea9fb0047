"""The terms of the objective and their settings: plain data, no torch, so that configs can hold it.

    ce            cross-entropy of the data's next response token
    response_kl   divergence from the cached teacher at the response rows (shifted: row p predicts p + 1)
    visual_kl     the same at the image rows (unshifted)
    relation      1 − cos(R_student, R_teacher) over the positions of each image

Source: LLaVA-KD (arXiv 2410.16236). Its paper sums L_res and L_vis over tokens, its code takes means
over tokens; here: means. Its code flattens R over the micro-batch; here: per image, mean over images.
"""

from typing import Final, Literal, get_args

from pydantic import Field

from schemas.base import Frozen

Term = Literal["ce", "response_kl", "visual_kl", "relation"]
TERMS: Final[tuple[Term, ...]] = get_args(Term)

IGNORE_LABEL: Final = -100
"""Label of a row without cross-entropy."""


class Divergence(Frozen):
    """How far the student q is from the teacher p, on the kept ids and the tail."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl"] = "forward_kl"
    """`forward_kl` KL(p‖q); `reverse_kl` KL(q‖p); `jensen_shannon` β KL(p‖m) + (1−β) KL(q‖m) with
    m = βp + (1−β)q; `skew_kl` KL(p‖λp + (1−λ)q); `skew_reverse_kl` KL(q‖λq + (1−λ)p) (DistiLLM)."""
    tail: Literal["bucket", "renormalise", "zero"] = "bucket"
    """What becomes of the vocabulary outside the kept ids: one bucket with its cached mass; both sides
    renormalised over the kept ids (the rest gets no gradient); or left out of the sum (for ids that
    were drawn at random this makes the forward KL's gradient unbiased)."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the Jensen–Shannon mixture."""
    skew: float = Field(0.1, gt=0, lt=1)
    """λ of the skew divergences."""
    temperature: float = Field(1.0, gt=0)
    """Student logits are divided by it; the targets must have been taken at the same temperature.
    The term is the divergence itself, not multiplied by its square."""


class RelationTerm(Frozen):
    """Which relation matrix is compared."""

    of: Literal["logits", "hidden"] = "logits"
    """R = Z Zᵀ of the vocabulary logits, through M = WᵀW; or R = H Hᵀ of the hidden states."""
    norm: Literal["none", "cosine"] = "none"
    """Rows as they are, or scaled to unit length first."""
