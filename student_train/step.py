"""One optimiser step: micro-batches -> terms -> gradient -> guard -> AdamW.

The loss is a mean over the whole global batch: its denominators are counted over all micro-batches
and processes first, so that splitting a batch changes rounding and nothing else. Random draws
(dropout) are seeded by stage and step, so a resumed run repeats them.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import TrainingError
from student_train.batch import Batch
from student_train.losses.balance import UncertaintyWeights
from student_train.losses.objective import Counts, Objective, counts_of
from student_train.losses.rows import Head
from student_train.losses.terms import RelationTerm, Term
from student_train.model import Student
from student_train.optim import learning_rate, make_optimizer, rate_share, set_learning_rate
from student_train.plan import PlannedStage
from student_train.sampling import stage_seed
from student_train.stream import StepInput


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step was like, over all processes."""

    raw: Mapping[Term, float]
    """Terms before their weights, nats (relation: none)."""
    weighted: Mapping[Term, float]
    """Terms times their weights."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Of this step."""
    num_tokens: int
    """Real tokens of the global batch."""
    padding_share: float
    """Share of the computed positions that is padding."""

    @property
    def loss(self) -> float:
        """Sum of the weighted terms."""
        return sum(self.weighted.values())

    def values(self) -> dict[str, float]:
        """Return everything by the name it has in the metrics."""
        terms = {f"raw/{term}": value for term, value in self.raw.items()}
        terms |= {f"weighted/{term}": value for term, value in self.weighted.items()}
        return {
            **terms,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "padding_share": self.padding_share,
        }


class StageTrainer:
    """A student frozen for one stage, with its optimiser."""

    def __init__(
        self,
        student: Student,
        planned: PlannedStage,
        relation: RelationTerm,
        accelerator: Any,
        *,
        vocab_size: int,
        seed: int,
    ) -> None:
        """Freeze the student, build the optimiser, let accelerate wrap both.

        Args:
            student: Carried over from the stage before.
            planned: The stage.
            relation: Which relation matrix the cache's factors speak of.
            accelerator: accelerate's `Accelerator`.
            vocab_size: Real tokens that teacher and student share.
            seed: The run's seed.
        """
        student.freeze_but(planned.stage.trains)
        self.student = student
        self.planned = planned
        self._stage = planned.stage
        self._accelerator = accelerator
        self._vocab_size = vocab_size
        self._seed = stage_seed(seed, planned.level, planned.number)
        learned = self._stage.learned_weights
        student.balance = UncertaintyWeights(learned) if learned else None
        self._objective = Objective(
            self._stage.terms, divergence=self._stage.divergence, relation=relation, balance=student.balance
        )
        balance = list(student.parameters_of("balance"))
        optimizer = make_optimizer(student, self._stage, balance)
        self.module, self.optimizer = accelerator.prepare(student, optimizer)
        self._clipped = [
            value
            for name, value in self.student.named_parameters()
            if value.requires_grad and student.part_of(name) != "balance"
        ]

    def step(self, inputs: StepInput) -> StepReport:
        """Take one optimiser step.

        Raises:
            TrainingError: Loss or gradient is not finite; names term, step and samples.
        """
        counts, num_tokens, num_positions = self._count(inputs.batches)
        rate = learning_rate(self._stage, inputs.step, self.planned.num_steps)
        set_learning_rate(self.optimizer, rate_share(self._stage, inputs.step, self.planned.num_steps))
        torch.manual_seed((self._seed + inputs.step * 8191 + self._accelerator.process_index) % 2**63)
        terms: list[Mapping[Term, Tensor]] = []
        for number, batch in enumerate(inputs.batches):
            last = number == len(inputs.batches) - 1
            with nullcontext() if last else self._accelerator.no_sync(self.module):
                outcome = self.module(
                    batch.to(self._accelerator.device), self._objective, counts, self._vocab_size
                )
                self._accelerator.backward(outcome.loss)
            terms.append(outcome.raw)
        norm = self._accelerator.clip_grad_norm_(self._clipped, self._stage.clip)
        self._guard(inputs, terms, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        raw = self._sum_terms(terms)
        return StepReport(
            raw=raw,
            weighted={name: self._weight(name) * value for name, value in raw.items()},
            grad_norm=float(norm),
            learning_rate=rate,
            num_tokens=num_tokens,
            padding_share=1 - num_tokens / num_positions,
        )

    def _count(self, batches: tuple[Batch, ...]) -> tuple[Counts, int, int]:
        """Denominators over the global batch, divided by the processes that gradients are averaged over."""
        local = [(*counts_of(batch), batch.num_tokens, batch.num_positions) for batch in batches]
        sums = torch.tensor(local, dtype=torch.float64).sum(dim=0)
        size = self._accelerator.num_processes
        if size > 1:
            sums = self._accelerator.reduce(sums.to(self._accelerator.device))
        rows, visual, images, num_tokens, num_positions = sums.tolist()
        counts = Counts(rows / size, visual / size, images / size)
        return counts, int(num_tokens), int(num_positions)

    def _guard(self, inputs: StepInput, terms: list[Mapping[Term, Tensor]], norm: float) -> None:
        if math.isfinite(norm):
            return
        found = [
            f"{term} = {float(value)} in samples {', '.join(batch.sample_ids[:8])}"
            for batch, values in zip(inputs.batches, terms, strict=True)
            for term, value in values.items()
            if not math.isfinite(float(value))
        ]
        samples = ", ".join(name for batch in inputs.batches for name in batch.sample_ids[:8])
        raise TrainingError(
            f"stage {self.planned.name}, step {inputs.step}: the gradient's norm is {norm}; "
            f"{'; '.join(found) or f'every term is finite, samples {samples}'}; lower the learning rate, "
            f"or look at the samples; --detect-anomaly names the operation"
        )

    def _weight(self, term: Term) -> float:
        """Weight times learned factor, after the step."""
        balance, weight = self.student.balance, self._stage.terms[term]
        return (
            weight * float(balance.factors()[term].detach()) if balance and term in balance.terms else weight
        )

    @torch.no_grad()
    def pulls(self, inputs: StepInput) -> dict[str, float]:
        """Return how hard each term pulls at the hidden states of the first micro-batch, as `pull/term`."""
        batch = inputs.batches[0].to(self._accelerator.device)
        head = Head(self.student.head_weight, self.student.head_bias, self._vocab_size)
        hidden = self.student.hidden(batch.inputs)
        with torch.enable_grad():
            norms = self._objective.gradient_norms(hidden, head, batch)
        return {f"pull/{term}": float(norm) for term, norm in norms.items()}

    def _sum_terms(self, terms: list[Mapping[Term, Tensor]]) -> dict[Term, float]:
        """Add up the micro-batches' shares of each term, over all processes."""
        names: list[Term] = list(self._stage.terms)
        zero = torch.zeros((), device=self._accelerator.device)
        sums = torch.stack([sum((each.get(name, zero) for each in terms), start=zero) for name in names])
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums, reduction="mean")
        return dict(zip(names, sums.tolist(), strict=True))
