"""Time and memory of one optimiser step, and the share of head and losses in it."""

import resource
import time
from collections.abc import Callable, Sequence

import torch

from common.doctor.check import Check, Finding
from common.doctor.host import size
from student_train.losses.objective import Objective
from student_train.losses.rows import Head
from student_train.losses.terms import RelationTerm
from student_train.step import StageTrainer
from student_train.stream import StepInput
from student_train.train import Run

_TIGHT = 0.9
"""Share of a GPU's memory above which a longer sample might not fit."""


def check_step(run: Run, trainer: StageTrainer, inputs: Sequence[StepInput], *, note: str) -> Check:
    """Take every step that was read, and report the fastest one after the first.

    Args:
        run: The student, its device.
        trainer: Its stage.
        inputs: Steps; the first one warms up.
        note: A remark about the targets.
    """
    device = run.accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, tokens, losses = [], 0, []
    for each in inputs:
        seconds.append(_timed(lambda each=each: losses.append(trainer.step(each)), on_gpu=on_gpu))  # type: ignore[misc]
        tokens = losses[-1].num_tokens
    best = min(seconds[1:] or seconds)
    head = _head_seconds(run, trainer, inputs[-1], on_gpu=on_gpu)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_rss()
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    values = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "precision": run.plan.config.precision,
        "samples": sum(len(batch.sample_ids) for batch in inputs[-1].batches),
        "tokens": tokens,
        "step_seconds": round(best, 4),
        "tokens_per_second": round(tokens / best, 1),
        "head_and_loss_share": round(min(1.0, head / best), 3),
        "peak_memory_bytes": peak,
        "peak_memory_is": "allocated on the GPU" if on_gpu else "resident set of the whole process",
        "loss": losses[-1].loss,
        "grad_norm": losses[-1].grad_norm,
        "note": note,
    }
    said = (
        f"{best:.3f} s per step of {values['samples']} samples ({tokens / best:,.0f} tokens per second, "
        f"{values['precision']}), head and losses {values['head_and_loss_share']:.0%}, "
        f"peak memory {size(peak)}" + (f"; {note}" if note else "")
    )
    finding = Finding("step", said, "a step that fits into memory with room to spare", values)
    if total is not None and peak > _TIGHT * total:
        return finding.warns(
            "a longer sample would not fit: --micro-batch 1, --gradient-checkpointing, --lora-rank 16"
        )
    return finding.passes()


def _head_seconds(run: Run, trainer: StageTrainer, inputs: StepInput, *, on_gpu: bool) -> float:
    """Forward and backward of the objective alone, on hidden states that are there already."""
    student, relation = trainer.student, run.plan.levels[0].manifest.relation
    objective = Objective(
        trainer.planned.stage.terms,
        divergence=trainer.planned.stage.divergence,
        relation=RelationTerm(of=relation.of, norm=relation.norm),
    )
    total = 0.0
    for each in inputs.batches:
        batch = each.to(run.accelerator.device)
        with torch.no_grad(), run.accelerator.autocast():
            hidden = student.hidden(batch.inputs).detach()
        weight = student.head_weight.detach().requires_grad_()
        head = Head(weight, student.head_bias, run.vocab_size(trainer.planned))

        def work(hidden: torch.Tensor = hidden, head: Head = head, batch: object = batch) -> None:
            with run.accelerator.autocast():
                loss = objective(hidden.requires_grad_(), head, batch).loss  # type: ignore[arg-type]
            torch.autograd.grad(loss, [hidden, head.weight], allow_unused=True)

        work()
        total += _timed(work, on_gpu=on_gpu)
    return total


def _timed(work: Callable[[], object], *, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
