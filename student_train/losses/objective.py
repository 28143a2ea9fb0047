"""The objective: every term of a batch, weighted and summed, with denominators of the whole step.

    hidden [B, T, D] ── rows ──> one walk over the head ──> ce, response_kl, visual_kl ─┐
                     ── rows ──> relation per image ──────> relation ───────────────────┴─> loss

A term is Σ over its rows / the step's number of such rows. With `Counts` of the whole optimiser step,
micro-batches and ranks add up to what one big batch would give. Terms of weight 0 cost nothing: their
rows never reach the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from common.errors import ConfigError, MismatchError
from common.vocab import check_ids
from student_train.batch import Batch, SparseTargets
from student_train.losses import eager, fused
from student_train.losses.balance import UncertaintyWeights
from student_train.losses.passes import Walk
from student_train.losses.relation import head_gram, relation_distances
from student_train.losses.rows import (
    Head,
    RowLosses,
    RowTargets,
    concat_targets,
    no_targets,
    targets_only,
)
from student_train.losses.terms import IGNORE_LABEL, TERMS, Divergence, RelationTerm, Term


class Counts(NamedTuple):
    """Denominators of the terms, over all micro-batches of an optimiser step and all ranks.

    Where gradients are averaged over ranks (DDP, FSDP), divide the counts by the number of ranks.
    """

    response_rows: float
    """Rows that predict a response token: denominator of `ce` and `response_kl`."""
    visual_rows: float
    """Image rows with a cached distribution, chosen or not: denominator of `visual_kl`."""
    images: float
    """Images with a relation factor: denominator of `relation`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call gives: `loss` carries the gradient, the values are detached float32 scalars."""

    loss: Float[Tensor, ""]
    """Σ weight × term."""
    raw: dict[Term, Tensor]
    """Each active term before its weight; over micro-batches and ranks they add up to the step's."""
    weighted: dict[Term, Tensor]
    """Each active term times its weight."""


def counts_of(batch: Batch) -> Counts:
    """Count one micro-batch."""
    weights = batch.visual_weights
    visual = batch.visual_rows.shape[0] if weights is None else round(float(weights.double().sum()))
    return Counts(batch.response_rows.shape[0], visual, len(batch.relations))


class Objective:
    """Weighted sum of the terms; call it with the hidden states of a batch."""

    def __init__(
        self,
        weights: Mapping[Term, float],
        *,
        divergence: Divergence | None = None,
        relation: RelationTerm | None = None,
        implementation: Literal["fused", "eager"] = "fused",
        walk: Walk | None = None,
        balance: UncertaintyWeights | None = None,
    ) -> None:
        """Choose terms.

        Args:
            weights: Term → weight ≥ 0; terms not named have weight 0.
            divergence: Of both KL terms; forward KL with the tail bucket unless given.
            relation: Of the relation term; logits, unnormalised unless given.
            implementation: `fused`, or the definition, `eager`, which holds all logits.
            walk: Chunk shape of the fused walk, chosen unless given.
            balance: Learned factors on top of the weights; its parameters belong in the optimiser.

        Raises:
            ConfigError: A weight is negative.
        """
        for term, weight in weights.items():
            if not weight >= 0:
                raise ConfigError(f"the weight of {term} is {weight}; weights must be 0 or more")
        self.weights: dict[Term, float] = {term: float(weights.get(term, 0.0)) for term in TERMS}
        self._divergence = divergence or Divergence()
        self._relation = relation or RelationTerm()
        self._implementation = implementation
        self._walk = walk
        self._balance = balance
        self._frozen_gram: tuple[tuple[object, ...], Tensor] | None = None

    def __call__(
        self,
        hidden: Float[Tensor, "B T D"],
        head: Head,
        batch: Batch,
        counts: Counts | None = None,
    ) -> Outcome:
        """Return the loss of a batch.

        Args:
            hidden: Final hidden states, after the last norm.
            head: The language-model head; frozen or trained.
            batch: Rows and targets.
            counts: Denominators of the whole step; this batch's own unless given.

        Raises:
            MismatchError: The batch lacks the targets of a term with weight, or ids leave the vocabulary.
        """
        counts = counts or counts_of(batch)
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss, raw = self._row_terms(flat, head, batch, counts)
        if self.weights["relation"] and batch.relations:
            distances = relation_distances(flat, self._gram(head), batch.relations, self._relation.norm)
            mean = distances.sum() / counts.images
            loss = loss + self._factor("relation") * mean
            raw["relation"] = mean.detach()
        if self._balance is not None:
            loss = loss + self._balance(self.weights, raw, _shares(batch, counts))
        return Outcome(loss, raw, {term: self._factor(term) * value for term, value in raw.items()})

    def gradient_norms(
        self,
        hidden: Float[Tensor, "B T D"],
        head: Head,
        batch: Batch,
        counts: Counts | None = None,
    ) -> dict[Term, Tensor]:
        """Return ‖d(weight × term) / d hidden‖ of each active term: how hard each one pulls.

        One walk a term, so a diagnosis and not something for every step. Arguments as for a call.
        """
        states = hidden.detach().requires_grad_()
        still = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.vocab_size)
        norms: dict[Term, Tensor] = {}
        for term in TERMS:
            alone = Objective(
                {term: float(self._factor(term))},
                divergence=self._divergence,
                relation=self._relation,
                implementation=self._implementation,
                walk=self._walk,
            )
            outcome = alone(states, still, batch, counts)
            if term in outcome.raw:
                norms[term] = torch.autograd.grad(outcome.loss, states)[0].norm()
        return norms

    def _factor(self, term: Term) -> float | Tensor:
        """Weight times learned factor, detached."""
        if self._balance is None or term not in self._balance.terms:
            return self.weights[term]
        return self.weights[term] * self._balance.factors()[term].detach()

    def _row_terms(
        self, flat: Tensor, head: Head, batch: Batch, counts: Counts
    ) -> tuple[Tensor, dict[Term, Tensor]]:
        responses = self._responses(batch, head, counts)
        images = self._images(batch, head, counts)
        parts = [part for part in (responses, images) if part is not None]
        if not parts:
            return _nothing(flat, head), {}
        rows = torch.cat([rows for rows, _ in parts])
        losses = self._head_losses(
            flat.index_select(0, rows), head, concat_targets([targets for _, targets in parts])
        )
        num = 0 if responses is None else responses[0].shape[0]
        raw: dict[Term, Tensor] = {}
        if responses is not None and self.weights["ce"]:
            raw["ce"] = losses.ce[:num].sum() / counts.response_rows
        if responses is not None and self.weights["response_kl"]:
            raw["response_kl"] = losses.kl[:num].sum() / counts.response_rows
        if images is not None:
            weights = 1.0 if batch.visual_weights is None else batch.visual_weights
            raw["visual_kl"] = (losses.kl[num:] * weights).sum() / counts.visual_rows
        return losses.total, raw

    def _responses(self, batch: Batch, head: Head, counts: Counts) -> tuple[Tensor, RowTargets] | None:
        rows, device = batch.response_rows, batch.response_rows.device
        if not rows.numel() or not (self.weights["ce"] or self.weights["response_kl"]):
            return None
        sparse = no_targets(rows.numel(), device)
        if self.weights["response_kl"]:
            sparse = _require(batch.response_targets, "response_kl", batch)
        labels = batch.response_labels
        if not self.weights["ce"]:
            labels = torch.full_like(labels, IGNORE_LABEL)
        each = torch.ones(rows.numel(), device=device) / counts.response_rows
        targets = RowTargets(labels, sparse, self._factor("ce") * each, self._factor("response_kl") * each)
        _check_real(targets, head.vocab_size, batch)
        return rows, targets

    def _images(self, batch: Batch, head: Head, counts: Counts) -> tuple[Tensor, RowTargets] | None:
        rows = batch.visual_rows
        if not rows.numel() or not self.weights["visual_kl"]:
            return None
        sparse = _require(batch.visual_targets, "visual_kl", batch)
        weights = batch.visual_weights
        each = torch.ones(rows.numel(), device=rows.device) if weights is None else weights
        each = each / counts.visual_rows
        targets = targets_only(sparse, self._factor("visual_kl") * each)
        _check_real(targets, head.vocab_size, batch)
        return rows, targets

    def _head_losses(self, hidden: Tensor, head: Head, targets: RowTargets) -> RowLosses:
        if self._implementation == "eager":
            return eager.head_losses(hidden, head, targets, self._divergence)
        return fused.head_losses(hidden, head, targets, self._divergence, walk=self._walk)

    def _gram(self, head: Head) -> Tensor | None:
        if self._relation.of == "hidden":
            return None
        parts = [part for part in (head.weight, head.bias) if part is not None]
        if any(part.requires_grad for part in parts):
            return head_gram(head)
        key = (head.vocab_size, *((part.data_ptr(), part._version, part.shape) for part in parts))
        if self._frozen_gram is None or self._frozen_gram[0] != key:
            self._frozen_gram = (key, head_gram(head).detach())
        return self._frozen_gram[1]


def _shares(batch: Batch, counts: Counts) -> dict[Term, float]:
    here = counts_of(batch)
    responses = here.response_rows / counts.response_rows if here.response_rows else 0.0
    return {
        "ce": responses,
        "response_kl": responses,
        "visual_kl": here.visual_rows / counts.visual_rows if here.visual_rows else 0.0,
        "relation": here.images / counts.images if here.images else 0.0,
    }


def _check_real(targets: RowTargets, vocab_size: int, batch: Batch) -> None:
    """Refuse ids outside the student's vocabulary, where looking does not stall a device."""
    if targets.labels.device.type == "cpu":
        where = f"one of the samples {', '.join(batch.sample_ids[:8])}"
        labels = targets.labels[targets.labels != IGNORE_LABEL]
        for ids in (labels, targets.sparse.token_ids):
            check_ids(ids.numpy(), vocab_size, where=where)


def _nothing(flat: Tensor, head: Head) -> Tensor:
    """Return a 0 that reaches hidden states and head: under data parallel every rank runs backward."""
    parts = [flat, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.stack([part[:1].sum() for part in parts]).sum() * 0.0


def _require(sparse: SparseTargets | None, term: str, batch: Batch) -> SparseTargets:
    if sparse is None:
        raise MismatchError(
            f"the term {term} has a weight, but the cache holds no distributions for it (samples "
            f"{', '.join(batch.sample_ids[:8])}); set its weight to 0, or dump those positions"
        )
    return sparse
