"""Term weights that are learned, and how hard each term pulls.

Uncertainty weighting (Kendall et al. 2018; Beta-KD applies it to distillation) replaces Σ w L by

    Σ w (e^-s L + s)        one s per learned term, least at e^-s = 1 / L

so that terms of very different size pull alike. The walk over the head takes factors as data; the
gradient of s is therefore added from the terms' values, which is exact because the loss is linear in them.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student_train.losses.terms import Term


class UncertaintyWeights(nn.Module):
    """One learned log-variance a term; terms not named keep the factor 1."""

    def __init__(self, terms: Sequence[Term]) -> None:
        """Start every named term at factor 1.

        Args:
            terms: Which terms learn their factor.
        """
        super().__init__()
        self.terms = tuple(terms)
        self.log_variance = nn.Parameter(torch.zeros(len(self.terms)))

    def factors(self) -> dict[Term, Tensor]:
        """Return e^-s of each learned term, with its gradient."""
        return dict(zip(self.terms, (-self.log_variance).exp().unbind(), strict=True))

    def forward(
        self,
        weights: Mapping[Term, float],
        raw: Mapping[Term, Tensor],
        shares: Mapping[Term, float],
    ) -> Float[Tensor, ""]:
        """Return what to add to a loss whose terms carry detached factors.

        Args:
            weights: Fixed weight w of each term.
            raw: Detached value of each term of this micro-batch.
            shares: This micro-batch's share of the step's denominators: s counts once a step.
        """
        added = self.log_variance.sum() * 0.0
        for term, factor, s in zip(self.terms, self.factors().values(), self.log_variance, strict=True):
            if term in raw:
                pull = (factor - factor.detach()) * raw[term]
                added = added + weights[term] * (pull + shares[term] * s)
        return added
