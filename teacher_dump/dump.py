"""A teacher's knowledge, sample by sample, into a cache.

    plan ──part──> prepare ahead (threads) ──wave──> engine ──records──> encode and seal (thread)

What is sealed stays; whatever stops the run, the same command goes on from the last seal.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

from tqdm import tqdm

from common.cache.writer import CacheWriter, read_seal
from common.data.source import SampleSource
from common.models import resolve_model
from common.pixels import pixels_note
from schemas.manifest import PartSeal
from teacher_dump.asking import open_data
from teacher_dump.config import DumpConfig
from teacher_dump.cost import check_disk, describe
from teacher_dump.faults import find_faults
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
from teacher_dump.same_images import check_sealed_images
from teacher_dump.teacher import Teacher, find_teacher
from teacher_dump.trial import run_trial

Say = Callable[[str], None]


def dump(config: DumpConfig, say: Say) -> dict[str, Any]:
    """Dump a level, or go on with one.

    Args:
        config: The settings.
        say: Takes one line for the user.

    Returns:
        What was done, as JSON types.

    Raises:
        CascacheError: Settings, data, engine or disk do not allow it.
    """
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
    if todo:
        if sealed:
            check_sealed_images(config.out, source)
        check_disk(config, describe(config, teacher, plan, todo, preparer, source))
        if config.workers > 1 or config.ray is not None:
            run_workers(config, writer, todo, teacher, quarantine)
        else:
            with choose_engine(engine_settings(config, teacher, manifest.capture)) as engine:
                capture = make_capture(engine, config, teacher, manifest.capture)
                run_parts(config, capture, writer, todo, preparer, quarantine)
    writer.finalize()
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
    """The plan with its estimate, and what can be told of bad samples, as JSON types.

    Raises:
        CascacheError: Nothing of it can be dumped, or a trial was asked for and fails.
    """
    config = config.model_copy(update={"out": choose_out(config.out, None)})
    found = describe(config, teacher, plan, plan.todo(frozenset()), preparer, source)
    faults = find_faults(source, plan.order, asks=config.teacher_answers)
    stops = sum(faults.counts.values()) > config.max_quarantine * faults.checked
    found["bad_samples"] = faults.to_json() | {"stops": stops}
    if config.sample_estimate is not None:
        found["trial"] = run_trial(config, teacher, plan, preparer, source)
    return found


def run_parts(
    config: DumpConfig,
    capture: PartCapture,
    writer: CacheWriter,
    todo: list[Part],
    preparer: Preparer,
    quarantine: QuarantineLog,
) -> None:
    """Capture every part of `todo`; one is being sealed while the next is computed."""
    indices = chain.from_iterable(part.samples.tolist() for part in todo)
    items = prepare_ahead(preparer, indices, threads=config.threads, ahead=2 * config.max_num_seqs)
    num_samples = sum(len(part.samples) for part in todo)
    with ThreadPoolExecutor(1, thread_name_prefix="seal") as sealer, _bar(num_samples) as bar:
        sealing: Future[PartSeal] | None = None
        for part in todo:
            mine = islice(items, len(part.samples))
            result = capture_part(capture, mine, bar)
            quarantine.check(result.quarantined)
            if sealing is not None:
                quarantine.add(sealing.result())
            sealing = sealer.submit(seal_part, writer, part, result)
        if sealing is not None:
            quarantine.add(sealing.result())


def run_workers(
    config: DumpConfig, writer: CacheWriter, todo: list[Part], teacher: Teacher, quarantine: QuarantineLog
) -> None:
    """Have the parts of `todo` written by other processes."""
    from teacher_dump.distributed import dump_parts

    sizes = {part.index: len(part.samples) for part in todo}
    with _bar(sum(sizes.values())) as bar:
        for part in dump_parts(config, writer.manifest, teacher, todo):
            seal = read_seal(writer.store, part)
            quarantine.check(list(seal.quarantined))
            quarantine.add(seal)
            bar.update(sizes[part])


def _bar(num_samples: int) -> Any:
    return tqdm(
        total=num_samples,
        unit="sample",
        desc="dump",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        smoothing=0.1,
    )
