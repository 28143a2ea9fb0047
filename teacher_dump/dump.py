"""A teacher's knowledge, sample by sample, into a cache.

    plan ──part──> prepare ahead (threads) ──wave──> engine ──records──> encode and seal (thread)

What is sealed stays; whatever stops the run, the same command resumes from the last seal.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from tqdm import tqdm

from common.cache.layout import identity_sha256
from common.cache.writer import CacheWriter, read_seal
from common.data.source import SampleSource
from common.extras import need_module
from common.models import resolve_model
from common.pixels import pixels_note
from schemas.manifest import PartSeal
from teacher_dump.asking import open_data
from teacher_dump.attempts import AttemptLog, attempts_place
from teacher_dump.config import DumpConfig
from teacher_dump.cost import check_disk, describe
from teacher_dump.faults import find_faults
from teacher_dump.fit import check_machine
from teacher_dump.level import (
    check_settings,
    choose_out,
    engine_settings,
    longest,
    make_manifest,
    plan_dump,
)
from teacher_dump.parts import capture_part, make_capture, seal_part
from teacher_dump.plan import Part, Plan
from teacher_dump.prompts import Preparer, prepare_ahead
from teacher_dump.public import choose_engine
from teacher_dump.quarantine import QuarantineLog
from teacher_dump.records import PartCapture
from teacher_dump.release import check_installed
from teacher_dump.same_images import check_sealed_images
from teacher_dump.teacher import Teacher, find_teacher
from teacher_dump.trial import run_trial

Say = Callable[[str], None]


def dump(config: DumpConfig, say: Say) -> dict[str, Any]:
    """Dump a level, or resume one.

    Args:
        config: The settings.
        say: Takes one line for the user.

    Returns:
        What was done, as JSON types.

    Raises:
        CascacheError: Settings, data, engine or disk do not allow it.
        ModuleNotFoundError: The extra that dumps is not installed.
    """
    need_module("transformers")
    if config.sample_estimate is not None or not config.plans_only:
        note = check_installed(any_version=config.any_vllm)
        if note:
            say(f"note: {note}")
    model = resolve_model(config.model)
    source = open_data(config)
    teacher = find_teacher(
        model,
        dtype=config.dtype,
        with_weights=not config.dry_run or config.sample_estimate is not None,
        options=config,
    )
    check_settings(config, teacher, source)
    if note := pixels_note(teacher.processor):
        say(note)
    plan = plan_dump(config, source)
    preparer = Preparer(
        source, teacher.processor, max_len=longest(config, teacher), asks=config.teacher_answers
    )
    if not config.dry_run or config.sample_estimate is not None:
        check_machine(config, teacher, max_len=longest(config, teacher))
    if config.plans_only:
        return preview(config, teacher, plan, preparer, source)
    manifest = make_manifest(config, source, teacher, plan)
    config = config.model_copy(update={"out": choose_out(config.out, manifest)})
    writer = CacheWriter.open(config.out, manifest)
    sealed = writer.sealed
    todo = plan.todo(sealed)
    say(
        f"teacher {teacher.ref.name} ({teacher.dtype}, {teacher.model_type}) on {len(plan.order)} samples of "
        f"{config.data}: top-{config.topk}, {config.positions} rows → {config.out}, "
        f"{len(todo)} of {plan.num_parts} parts to do"
    )
    quarantine = QuarantineLog(
        config, len(plan.order), [read_seal(writer.store, part) for part in sorted(sealed)]
    )
    job = Job(config, writer, teacher, todo, quarantine, say)
    if todo:
        if sealed:
            check_sealed_images(config.out, source)
        check_disk(config, describe(config, teacher, plan, todo, preparer, source))
        run = run_workers if config.workers > 1 or config.ray is not None else run_here
        run(job, preparer)
    writer.finalize()
    job.attempts.tidy(writer.sealed)
    return {
        "cache": config.out,
        "parts": plan.num_parts,
        "dumped": len(todo),
        "quarantined": quarantine.count,
        "quarantine": str(quarantine.path),
    }


def preview(
    config: DumpConfig, teacher: Teacher, plan: Plan, preparer: Preparer, source: SampleSource
) -> dict[str, Any]:
    """The plan with its estimate, and the known bad samples, as JSON types.

    Raises:
        CascacheError: Nothing of it can be dumped, or a trial was asked for and fails.
    """
    config = config.model_copy(update={"out": choose_out(config.out, None)})
    found = describe(config, teacher, plan, plan.todo(frozenset()), preparer, source)
    found["weights"], found["directory"] = teacher.has_weights, str(teacher.path)
    faults = find_faults(source, plan.order, teacher.processor, asks=config.teacher_answers)
    stops = sum(faults.counts.values()) > config.max_quarantine * faults.checked
    found["bad_samples"] = faults.to_json() | {"stops": stops}
    if config.sample_estimate is not None:
        found["trial"] = run_trial(config, teacher, plan, preparer, source)
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """Parts to write."""

    config: DumpConfig
    """The settings; `out` is decided."""
    writer: CacheWriter
    """Of the cache."""
    teacher: Teacher
    """Whose knowledge it is."""
    todo: list[Part]
    """Parts that are not sealed."""
    quarantine: QuarantineLog
    """Counts samples without a record."""
    say: Say
    """Takes one line for the user."""

    @property
    def attempts(self) -> AttemptLog:
        """The log of parts that earlier runs died in."""
        identity = identity_sha256(self.writer.manifest)
        return AttemptLog(attempts_place(self.config.out), identity)

    def say_beside_bar(self, line: str) -> None:
        """A line for the user that does not cut the progress bar up."""
        with tqdm.external_write_mode(sys.stderr):
            self.say(line)


def run_here(job: Job, preparer: Preparer) -> None:
    """Write all parts with one engine of this process."""
    settings = engine_settings(job.config, job.teacher, job.writer.manifest.capture)
    deadly = job.attempts.deadly(part.index for part in job.todo)
    if deadly and settings.inside is not False:
        job.say(
            f"earlier runs died in part {deadly[0]}: the engine gets a process of its own, "
            "where a sample that kills it can be found"
        )
        settings = replace(settings, inside=False)
    with choose_engine(settings) as engine:
        capture = make_capture(
            engine, job.config, job.teacher, job.writer.manifest.capture, job.say_beside_bar
        )
        run_parts(job, capture, preparer)


def run_parts(job: Job, capture: PartCapture, preparer: Preparer) -> None:
    """Capture every part; one is being sealed while the next is computed."""
    config, attempts, quarantine = job.config, job.attempts, job.quarantine
    indices = chain.from_iterable(part.samples.tolist() for part in job.todo)
    items = prepare_ahead(preparer, indices, threads=config.threads, ahead=2 * config.max_num_seqs)
    num_samples = sum(len(part.samples) for part in job.todo)
    with ThreadPoolExecutor(1, thread_name_prefix="seal") as sealer, _bar(num_samples) as bar:
        sealing: Future[PartSeal] | None = None
        for part in job.todo:
            mine = islice(items, len(part.samples))
            with attempts.attempt(part.index) as attempt:
                result = capture_part(capture, mine, bar, attempt)
            quarantine.check(result.quarantined)
            if sealing is not None:
                quarantine.add(sealing.result())
            sealing = sealer.submit(seal_part, job.writer, part, result)
        if sealing is not None:
            quarantine.add(sealing.result())


def run_workers(job: Job, _: Preparer) -> None:
    """Have the parts written by other processes."""
    from teacher_dump.distributed import dump_parts

    sizes = {part.index: len(part.samples) for part in job.todo}
    with _bar(sum(sizes.values())) as bar:
        done = dump_parts(job.config, job.writer.manifest, job.teacher, job.todo, say=job.say_beside_bar)
        for part in done:
            seal = read_seal(job.writer.store, part)
            job.quarantine.check(list(seal.quarantined))
            job.quarantine.add(seal)
            bar.update(sizes[part])


def _bar(num_samples: int) -> Any:
    return tqdm(
        total=num_samples,
        unit="sample",
        desc="dump",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        smoothing=0.1,
    )
