"""What a training step from a cache costs, beside plain fine-tuning and beside a teacher in the loop.

    sft             head and cross-entropy at the response rows only
    sft, own loss   transformers' own loss: logits of every position
    online          the teacher's forward pass and head in every step, the same fused loss
    cached          the same targets from the cache; eager (all logits of the rows) and fused

Every way takes the same batches, read ahead, through forward, backward and AdamW; one round runs each once.
Times are process seconds of one thread, ratios medians over the rounds, so that other work on the machine
hits both sides. Then a real `student-train` run says how long its steps wait for data, and
`bench_student_losses` what the loss alone costs and how it grows.

    python -m scripts.bench_student                                          # build/bench/student.json
    python -m scripts.bench_student --cache zarr/l1 --student 0.5b --teacher 7b     # on a real dump
"""

import argparse
import json
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.models import resolve_model
from common.topk import sparse_rows
from scripts import bench_student_losses as losses
from scripts.bench_student_data import Bench, make
from student_train.batch import Batch, SparseTargets
from student_train.config import TrainConfig
from student_train.losses.objective import Objective, counts_of
from student_train.losses.terms import RelationTerm, Term
from student_train.metrics import write_json
from student_train.model import load_student
from student_train.optim import make_optimizer
from student_train.pixels import PixelLoader
from student_train.plan import Plan, make_plan
from student_train.stream import RecordSource, Share, Stream, input_layout
from student_train.train import train

Samples = dict[str, list[tuple[float, int]]]

RESPONSE: dict[Term, float] = {"ce": 1.0, "response_kl": 1.0}
IMAGES: dict[Term, float] = {**RESPONSE, "visual_kl": 1.0}
EVERYTHING: dict[Term, float] = {**IMAGES, "relation": 0.5}


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    terms: Mapping[Term, float]
    """The objective; what is compared has the same."""
    loss: Literal["fused", "eager", "own"] = "fused"
    """Which implementation; `own` is transformers'."""
    visual: int | None = 0
    """Image rows an image that meet the head; None means all."""
    teacher: bool = False
    """Whether the targets are computed in the step."""
    as_labels: bool = False
    """Whether the image rows get a cross-entropy: plain fine-tuning with as many head rows."""


WAYS: dict[str, Way] = {
    "sft": Way({"ce": 1.0}),
    "sft, own loss": Way({"ce": 1.0}, loss="own"),
    "sft, image rows too": Way({"ce": 1.0}, visual=None, as_labels=True),
    "online, response": Way(RESPONSE, teacher=True),
    "online, + all image rows": Way(IMAGES, visual=None, teacher=True),
    "cached eager, response": Way(RESPONSE, loss="eager"),
    "cached, response": Way(RESPONSE),
    "cached, + 8 image rows": Way(IMAGES, visual=8),
    "cached, + all image rows": Way(IMAGES, visual=None),
    "cached, + all image rows + relation": Way(EVERYTHING, visual=None),
}

RATIOS: dict[str, tuple[str, str]] = {
    "cached_over_sft": ("cached, response", "sft"),
    "cached_over_sft_image_rows": ("cached, + all image rows", "sft, image rows too"),
    "cached_over_sft_own_loss": ("cached, response", "sft, own loss"),
    "cached_8_image_rows_over_sft": ("cached, + 8 image rows", "sft"),
    "cached_all_image_rows_over_sft": ("cached, + all image rows", "sft"),
    "cached_everything_over_sft": ("cached, + all image rows + relation", "sft"),
    "cached_everything_over_sft_own_loss": ("cached, + all image rows + relation", "sft, own loss"),
    "online_over_cached": ("online, response", "cached, response"),
    "online_over_cached_image_rows": ("online, + all image rows", "cached, + all image rows"),
    "eager_over_fused": ("cached eager, response", "cached, response"),
}


class Bed:
    """Student, teacher and batches that every way works on."""

    def __init__(self, plan: Plan, teacher: str, *, num_batches: int) -> None:
        """Load both models and read the batches of every way.

        Args:
            plan: Of one level with one stage that has every term.
            teacher: The model that the cache was dumped from.
            num_batches: Steps' worth of batches, used in turn.
        """
        self.student = load_student(plan.student.path_or_id)
        self.teacher = load_student(resolve_model(teacher).path_or_id)
        self.student.freeze_but(("projector", "llm"))
        self.teacher.requires_grad_(False).eval()
        level, planned = plan.levels[0], plan.stages[0]
        self.vocab_size = min(level.manifest.vocab_size, plan.shape.vocab_rows)
        self.relation = RelationTerm(of=level.manifest.relation.of, norm=level.manifest.relation.norm)
        self.kept = level.manifest.capture.topk
        self.optimizer = make_optimizer(self.student, planned.stage)
        self._plan = plan
        self._batches = {
            name: [self._read(way, step) for step in range(num_batches)] for name, way in WAYS.items()
        }

    def _read(self, way: Way, step: int) -> Batch:
        """One step's batch, whole, with what the way needs."""
        level, planned = self._plan.levels[0], self._plan.stages[0]
        wanted = replace(
            planned.wanted,
            terms=frozenset(EVERYTHING if way.as_labels else way.terms),
            visual_positions=way.visual or None,
        )
        layout = input_layout(
            self._plan.processor,
            self._plan.shape.image_token_id,
            token_types=self.student.family.token_types,
            vocab_size=self.vocab_size,
        )
        stream = Stream(
            RecordSource(level.cache, keep_blocks=8),
            PixelLoader(level.source, self._plan.processor, keep_bytes=0),
            planned.sampler,
            layout,
            wanted,
            share=Share(),
            workers=1,
            prefetch=1,
        )
        (batch,) = stream.read_step(step).batches
        return _label_images(batch, self.vocab_size) if way.as_labels else batch

    def batch(self, name: str, turn: int) -> Batch:
        """The batch of a turn."""
        return self._batches[name][turn % len(self._batches[name])]

    def step(self, name: str, turn: int) -> Callable[[], None]:
        """One optimiser step, ready to be called."""
        way, batch = WAYS[name], self.batch(name, turn)
        objective = Objective(
            way.terms, relation=self.relation, implementation="eager" if way.loss == "eager" else "fused"
        )

        def run() -> None:
            given = self.ask_teacher(batch) if way.teacher else batch
            if way.loss == "own":
                loss = self.student.model(**given.inputs, labels=_labels(given)).loss
            else:
                loss = self.student(given, objective, counts_of(given), self.vocab_size).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return run

    @torch.no_grad()
    def ask_teacher(self, batch: Batch) -> Batch:
        """The batch with targets from the teacher's own forward pass."""
        hidden = self.teacher.hidden(batch.inputs).flatten(0, 1)
        visual = self._distributions(hidden, batch.visual_rows) if batch.visual_targets else None
        return replace(
            batch,
            response_targets=self._distributions(hidden, batch.response_rows),
            visual_targets=visual,
        )

    def _distributions(self, hidden: Tensor, rows: Tensor) -> SparseTargets:
        """Top-k of the teacher at some rows, 64 rows of logits at a time."""
        weight = self.teacher.head_weight[: self.vocab_size]
        found = [sparse_rows(hidden[some] @ weight.T, self.kept) for some in torch.split(rows, 64)]
        return SparseTargets(
            torch.cat([each.token_ids for each in found]).long(),
            torch.cat([each.logprobs for each in found]),
            torch.cat([each.log_tail for each in found])[:, 0],
        )


def _label_images(batch: Batch, vocab_size: int) -> Batch:
    """Cross-entropy at the image rows too, of any label: the head's work without the teacher's targets."""
    labels = torch.arange(batch.visual_rows.numel()) % vocab_size
    return replace(
        batch,
        response_rows=torch.cat([batch.response_rows, batch.visual_rows]),
        response_labels=torch.cat([batch.response_labels, labels]),
    )


def _labels(batch: Batch) -> Tensor:
    """[B, T] labels as transformers wants them: not shifted, −100 where there is none."""
    ids = batch.inputs["input_ids"]
    labels = torch.full_like(ids, -100).flatten()
    labels[batch.response_rows + 1] = batch.response_labels
    return labels.view_as(ids)


def measure_steps(bed: Bed, rounds: int, names: Sequence[str] = tuple(WAYS)) -> Samples:
    """Interleave the ways, `rounds` times after a warm-up, each time in another order."""
    samples: Samples = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(names, len(names)):
            sample = losses.run_once(bed.step(name, turn), "cpu")
            if turn:
                samples[name].append(sample)
    return samples


def step_report(bed: Bed, samples: Samples) -> dict[str, Any]:
    """Medians of every way, and the ratios, each the median of its rounds' own ratios."""
    ways = {}
    for name, taken in samples.items():
        batch = bed.batch(name, 0)
        visual = batch.visual_rows.numel() if "visual_kl" in WAYS[name].terms else 0
        rows = batch.num_positions if WAYS[name].loss == "own" else batch.response_rows.numel() + visual
        ways[name] = {
            "seconds": statistics.median(seconds for seconds, _ in taken),
            "least_seconds": min(seconds for seconds, _ in taken),
            "peak_bytes": int(statistics.median(peak for _, peak in taken)),
            "tokens": batch.num_tokens,
            "head_rows": rows,
        }
    return {"ways": ways} | {
        name: statistics.median(
            over / under for (over, _), (under, _) in zip(samples[top], samples[bottom], strict=True)
        )
        for name, (top, bottom) in RATIOS.items()
        if top in samples and bottom in samples
    }


def measure_wait(config: TrainConfig) -> dict[str, float]:
    """Share of a real run's step time that it waited for data, its first step (nothing read yet) left out."""
    summary = train(config.model_copy(update={"restart": True, "log_steps": 1}))
    lines = [json.loads(line) for line in (Path(summary["out"]) / "metrics.jsonl").read_text().splitlines()]
    waited, lasted = (sum(line[name] for line in lines[1:]) for name in ("wait_seconds", "step_seconds"))
    return {"data_wait_share": waited / lasted, "data_wait_steps": len(lines) - 1}


def measure_losses(rows: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """The loss alone, fused against naive, and how both grow with N, K and V."""
    case = losses.Case(rows, 64, vocabulary, 256, trained_head=False)
    found = losses.measure(case, ["naive", "fused"], repeats=repeats)
    small = replace(case, width=64)
    grown = [small, *losses.growth(small)]
    growth = [each for one in grown for each in losses.measure(one, ["naive", "fused"], repeats=1)]
    return {**losses.ratios(found), "loss": [asdict(each) for each in found], "growth": _growth(growth)}


def _growth(found: list[losses.Measured]) -> list[dict[str, Any]]:
    return [
        {
            "rows": each.case.rows,
            "kept": each.case.kept,
            "vocabulary": each.case.vocabulary,
            "implementation": each.implementation,
            "seconds": each.seconds,
            "peak_bytes": each.peak_bytes,
        }
        for each in found
    ]


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    for name, way in report["ways"].items():
        print(
            f"{name:38}{way['seconds']:8.3f} s (least {way['least_seconds']:.3f})"
            f"{way['peak_bytes'] / 2**20:9.0f} MiB{way['tokens']:7} tokens{way['head_rows']:6} head rows"
        )
    for one in report.get("growth", ()):
        print(
            f"loss, {one['implementation']:6} N {one['rows']:5} K {one['kept']:4} V {one['vocabulary']:7}"
            f"{one['seconds']:9.3f} s{one['peak_bytes'] / 2**20:9.0f} MiB"
        )
    for name, value in report.items():
        if isinstance(value, float):
            print(f"{name:38}{value:8.3f}")


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/student.json"))
    parser.add_argument("--cache", type=Path, help="a level's cache; made unless given")
    parser.add_argument("--student", help="with --cache: the student")
    parser.add_argument("--teacher", help="with --cache: the cache's teacher")
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--way", action="append", choices=WAYS, help="only these ways")
    parser.add_argument("--wait-steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2048, help="N of the loss alone; 0 leaves it out")
    parser.add_argument("--vocabulary", type=int, default=Bench.vocabulary)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    made = None if args.cache else make(Bench(vocabulary=args.vocabulary), args.out.parent / "student")
    config = bench_config(
        args.out.parent / "student-run",
        cache=str(args.cache or (made and made.cache)),
        student=str(args.student or (made and made.student)),
        batch=args.batch,
        steps=args.wait_steps,
    )
    bed = Bed(make_plan(config), str(args.teacher or (made and made.teacher)), num_batches=3)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
        "rounds": args.rounds,
        **step_report(bed, measure_steps(bed, args.rounds, args.way or tuple(WAYS))),
    }
    del bed
    report |= measure_wait(config)
    write_json(args.out, report)
    if args.rows:
        report |= measure_losses(args.rows, args.vocabulary, repeats=3)
    write_json(args.out, report)
    show(report)


def bench_config(out: Path, *, cache: str, student: str, batch: int, steps: int) -> TrainConfig:
    """A run of one stage with every term."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.toml"
    recipe.write_text(
        f'base = "paper"\n[[levels]]\nstages = [{{name = "dft", kinds = [], steps = {steps}, '
        f"batch_size = {batch}}}]\n"
    )
    return TrainConfig(
        cache=(cache,),
        student=student,
        recipe=str(recipe),
        out=str(out / "run"),
        tensorboard=False,
        device="cpu",
        save_steps=10**6,
    )


if __name__ == "__main__":
    main()
