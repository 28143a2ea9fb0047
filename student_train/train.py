"""The loop: level -> stage -> batch -> terms -> step -> checkpoint.

    plan ──> run ──> for each stage of each level, from the cursor on
                       freeze, build the optimiser
                       for each step: batches (read ahead) ──> StageTrainer.step ──> metrics, checkpoint
             model/ ──> evaluation ──> summary.json

The student is carried over from stage to stage; the optimiser starts anew in each. Killed at any
moment, the same command resumes from the last checkpoint and ends with the same weights.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import torch

from common.errors import ConfigError
from student_train.card import model_card
from student_train.checkpoint import (
    Checkpoints,
    Cursor,
    gather_all,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    put_weights,
    trained_weights,
)
from student_train.config import TrainConfig
from student_train.evaluate import Team, evaluate, write_results
from student_train.interrupt import Interrupt
from student_train.keep import BestKeeper, WeightAverage, save_copy
from student_train.launch import make_accelerator
from student_train.losses.terms import RelationTerm
from student_train.metrics import Line, Metrics, progress_bar, read_stage_ends, write_json
from student_train.model import Student, load_student, save_student
from student_train.pixels import PixelLoader
from student_train.plan import Plan, PlannedStage, make_plan
from student_train.profiling import Profiler
from student_train.retell import retold
from student_train.rundir import RunDirectory
from student_train.step import StageTrainer, StepReport
from student_train.stream import RecordSource, Share, StepInput, Stream, input_layout

Summary = dict[str, Any]


def train(config: TrainConfig, plan: Plan | None = None) -> Summary:
    """Train a student from its caches and say what came out.

    Args:
        config: The settings.
        plan: What `make_plan(config)` gave, if it has been called already.

    Raises:
        CascacheError: Whatever stops the run; see `common.errors`.
    """
    with Run(plan or make_plan(config)) as run:
        for number, planned in run.stages_left():
            if run.stopped():
                return run.summarise()
            trainer = run.begin(number, planned)
            for inputs, wait_seconds in run.read(planned):
                pulls = run.pulls(trainer, inputs)
                run.record(trainer, trainer.step(inputs), inputs.step, pulls | {"wait_seconds": wait_seconds})
                if run.stopped():
                    return run.summarise()
        run.save_model()
        run.answer_held_out()
        return run.summarise()


class Run:
    """A plan being carried out: its student, its cursor, its directory."""

    def __init__(self, plan: Plan) -> None:
        """Claim the run directory, find the newest checkpoint, load the student unless all is done.

        Args:
            plan: What to do.

        Raises:
            TrainingError: The directory holds a run with other settings.
        """
        config = plan.config
        self.plan = plan
        self.directory = RunDirectory(plan.out, plan.identity())
        self.accelerator = make_accelerator(plan)
        self._is_main = bool(self.accelerator.is_main_process)
        if self._is_main:
            self.directory.claim(restart=config.restart, notes=plan.notes)
        self.accelerator.wait_for_everyone()
        self._checkpoints = Checkpoints(self.directory.checkpoints, self.directory.identity)
        found = None if self.directory.finished else self._checkpoints.latest()
        done = Cursor(len(plan.stages), 0, plan.total_steps) if self.directory.finished else Cursor()
        self.cursor = found.cursor if found else done
        self._started_at = self.cursor.total_steps
        self._balance: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}
        self._moments: dict[str, torch.Tensor] = {}
        self.student: Student | None = None
        if not self.directory.finished:
            self.student = load_student(plan.student.path_or_id, revision=plan.student.revision)
            if config.lora_rank is not None:
                self.student.add_adapters(config.lora_rank, seed=config.seed)
            if config.gradient_checkpointing:
                self.student.recompute_activations()
            if found:
                weights, self._moments = load_tensors(found)
                self._balance = _take(weights, "balance.")
                self._average = {
                    name.removeprefix("ema."): value for name, value in _take(weights, "ema.").items()
                }
                put_weights(self.student, weights)
        self.metrics = Metrics(
            self.directory.metrics if self._is_main else None,
            log_steps=config.log_steps,
            accelerator=self.accelerator if config.tensorboard else None,
        )
        self._scores: dict[str, Any] | None = None
        self.average = WeightAverage(config.ema) if config.ema else None
        self._keeper = BestKeeper(plan, self.directory.best_model) if config.eval_steps else None
        if self._keeper or self.average:
            self._require_whole_weights()

    def _require_whole_weights(self) -> None:
        kind = str(self.accelerator.distributed_type).rpartition(".")[2]
        if kind in ("FSDP", "DEEPSPEED"):
            raise ConfigError(
                f"--eval-steps and --ema need the whole student in one process, {kind} shards it; leave them "
                f"out, and answer questions afterwards with `student-train eval`"
            )

    def __enter__(self) -> Self:
        """Start trackers and progress bar."""
        self.metrics.resume(self.cursor.total_steps)
        if self.plan.config.tensorboard and not self.directory.finished:
            self.accelerator.init_trackers("tensorboard")
        self._bar: Any = progress_bar(
            min(self.plan.total_steps, self.plan.config.max_steps or self.plan.total_steps),
            done=self.cursor.total_steps,
            shown=self._is_main,
        )
        self._interrupt = Interrupt(enabled=self.accelerator.num_processes == 1).__enter__()
        wanted = self.plan.config.profile and self._is_main
        self._profiler = Profiler(self.directory.path / "profile.json" if wanted else None)
        self._began = self._step_began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close trackers and progress bar."""
        self._interrupt.__exit__(kind, error, trace)
        self._profiler.close()
        self._bar.close()
        self.accelerator.end_training()

    def stopped(self) -> bool:
        """Whether `--max-steps` ends the run before its time."""
        limit = self.plan.config.max_steps
        return limit is not None and limit <= self.cursor.total_steps < self.plan.total_steps

    def stages_left(self) -> Iterator[tuple[int, PlannedStage]]:
        """Yield the stages from the cursor on, with their numbers."""
        yield from list(enumerate(self.plan.stages))[self.cursor.stage :]

    def begin(self, number: int, planned: PlannedStage) -> StageTrainer:
        """Prepare a stage; where a run was killed inside it, put its optimiser back."""
        assert self.student is not None
        relation = self.plan.levels[planned.level].manifest.relation
        self.accelerator.free_memory()
        torch.autograd.set_detect_anomaly(self.plan.config.detect_anomaly, check_nan=True)
        trainer = StageTrainer(
            self.student,
            planned,
            RelationTerm(of=relation.of, norm=relation.norm),
            self.accelerator,
            vocab_size=self.vocab_size(planned),
            seed=self.plan.config.seed,
        )
        put_weights(self.student, self._balance)
        load_optimizer_state(trainer.optimizer.optimizer, self.student, self._moments)
        if self.average:
            self.average.values |= self._average
            self.average.start(self.student)
        self._balance, self._average, self._moments = {}, {}, {}
        self._bar.set_description(planned.name)
        self._step_began = time.perf_counter()
        return trainer

    def vocab_size(self, planned: PlannedStage) -> int:
        """Real tokens that a stage's teacher and the student share."""
        return min(self.plan.levels[planned.level].manifest.vocab_size, self.plan.shape.vocab_rows)

    def read(self, planned: PlannedStage) -> Iterator[tuple[StepInput, float]]:
        """Yield a stage's steps from the cursor on, with the seconds each was waited for."""
        with closing(self._stream(planned).read_steps(self.cursor.step, planned.num_steps)) as steps:
            while True:
                began = time.perf_counter()
                inputs = next(steps, None)
                if inputs is None:
                    return
                yield inputs, time.perf_counter() - began

    def _stream(self, planned: PlannedStage) -> Stream:
        assert self.student is not None
        config, level = self.plan.config, self.plan.levels[planned.level]
        records = retold(level.cache, level.source, self.plan.processor)
        layout = input_layout(
            self.plan.processor,
            self.plan.shape.image_token_id,
            token_types=self.student.family.token_types,
            vocab_size=self.vocab_size(planned),
        )
        return Stream(
            RecordSource(records, keep_blocks=2 * config.shuffle_blocks),
            PixelLoader(
                level.source,
                self.plan.processor,
                keep_bytes=config.pixel_cache_mb << 20,
                own_grid=config.image_grid == "own",
            ),
            planned.sampler,
            layout,
            planned.wanted,
            share=Share(self.accelerator.process_index, self.accelerator.num_processes, config.micro_batch),
            workers=config.workers,
            prefetch=config.prefetch,
            first_batch_only=config.overfit_one_batch,
            pin=self.accelerator.device.type == "cuda",
        )

    def pulls(self, trainer: StageTrainer, inputs: StepInput) -> dict[str, float]:
        """Return each term's pull when `--term-gradients` asks for it at this step."""
        every = self.plan.config.term_gradients
        return trainer.pulls(inputs) if every and self.cursor.total_steps % every == 0 else {}

    def record(
        self, trainer: StageTrainer, report: StepReport, step: int, extra: Mapping[str, float]
    ) -> None:
        """Move the cursor past a step; write metrics and, when it is time, a checkpoint.

        Args:
            trainer: The stage's.
            report: What the step was like.
            step: Its number within the stage.
            extra: Further values to log; `wait_seconds` is the time waited for data.
        """
        planned, config = trainer.planned, self.plan.config
        ends_stage = step + 1 == planned.num_steps
        total = self.cursor.total_steps + 1
        self.cursor = (
            Cursor(self.cursor.stage + 1, 0, total)
            if ends_stage
            else Cursor(self.cursor.stage, step + 1, total)
        )
        seconds = time.perf_counter() - self._step_began
        if self.average:
            self.average.update(trainer.student)
        speed = {
            "tokens_per_second": report.num_tokens / seconds,
            "data_wait_share": extra["wait_seconds"] / seconds,
            "step_seconds": seconds,
        }
        where: Line = {
            "level": planned.level + 1,
            "stage": planned.stage.name,
            "step": step + 1,
            "total_step": total,
        }
        self.metrics.add({**report.values(), **extra, **speed, **self._look(total)}, where=where)
        if ends_stage or self.stopped():
            self.metrics.flush(where)
        self._bar.update()
        self._bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
        self._profiler.step()
        if ends_stage or self.stopped() or self._interrupt.asked or total % config.save_steps == 0:
            self._save_checkpoint(trainer, ends_stage=ends_stage)
        if self._interrupt.asked:
            raise KeyboardInterrupt(f"step {total} of {self.plan.total_steps} is saved")
        self._step_began = time.perf_counter()

    def _look(self, total: int) -> dict[str, float]:
        """Answer the held-out questions when it is time; all processes share them."""
        every = self.plan.config.eval_steps
        if self._keeper is None or every is None or (total % every and total != self.plan.total_steps):
            return {}
        assert self.student is not None
        values = self._keeper.look(self.student, total, self._team())
        self.accelerator.wait_for_everyone()
        return values

    def _team(self) -> Team:
        from accelerate.utils import gather_object

        return Team(self.accelerator.process_index, self.accelerator.num_processes, gather_object)

    def _save_checkpoint(self, trainer: StageTrainer, *, ends_stage: bool) -> None:
        """A finished stage leaves its weights; an unfinished one its optimiser and learned factors too."""
        done = self.plan.stages[: self.cursor.stage + (not ends_stage)]
        parts: set[str] = {part for each in done for part in each.stage.trains}
        moments: dict[str, torch.Tensor] = {}
        if not ends_stage:
            parts.add("balance")
            moments = optimizer_state(trainer.optimizer.optimizer, trainer.student, keep=self._is_main)
        weights = trained_weights(trainer.student, parts, keep=self._is_main)
        if self.average:
            weights |= {f"ema.{name}": value for name, value in self.average.values.items()}
        if self._is_main:
            self._checkpoints.save(self.cursor, weights, moments)
        self.accelerator.wait_for_everyone()

    def save_model(self) -> None:
        """Write the finished student with its card, and drop the checkpoints."""
        if self.student is None:
            return
        if self.average and self._is_main:
            shutil.rmtree(self.directory.average_model, ignore_errors=True)
            average = self.average.values | self._average
            save_copy(
                self.student, self.plan, self.plan.processor, self.directory.average_model, weights=average
            )
        self.student.merge_adapters()
        weights = gather_all(self.student.model.state_dict(keep_vars=True), keep=self._is_main)
        if self._is_main:
            card = model_card(self.plan, dict(self.metrics.last))
            save_student(self.student, self.plan.processor, self.directory.model, card=card, weights=weights)
            self._checkpoints.forget()
        self.accelerator.wait_for_everyone()

    def answer_held_out(self) -> None:
        """Answer the `--eval` questions with the finished student; all processes share them."""
        if self.plan.held_out is not None:
            device, team = self.accelerator.device, self._team()
            model = str(self.directory.model)
            self._scores, answers = evaluate(model, self.plan.held_out, device=device, team=team)
            if self._is_main:
                write_results(self.directory.path, self._scores, answers)
        self.accelerator.wait_for_everyone()

    def summarise(self) -> Summary:
        """Write summary.json and return it."""
        steps, seconds = self.cursor.total_steps - self._started_at, time.perf_counter() - self._began
        summary: Summary = {
            "model": str(self.directory.model) if self.directory.finished else None,
            "out": str(self.directory.path),
            "student": self.plan.student.name,
            "finished": self.directory.finished,
            "steps": self.cursor.total_steps,
            "total_steps": self.plan.total_steps,
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / seconds, 3),
            "stages": read_stage_ends(self.directory.metrics),
            "eval": self._scores,
            "best": self._keeper and self._keeper.best,
            "is_main": self._is_main,
        }
        if self._is_main and (steps or self._scores):
            write_json(self.directory.summary, summary)
        return summary


def _take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Move the tensors of a prefix out."""
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
