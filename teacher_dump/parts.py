"""One part from samples to seal, as every way of running a dump does it.

source indices ──prepare ahead──> waves ──engine──> records ──encode──> sealed part
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from common.cache.writer import CacheWriter
from schemas.manifest import Capture, PartSeal, Quarantined
from teacher_dump.answers import Answerer
from teacher_dump.attempts import Attempt, AttemptLog
from teacher_dump.config import DumpConfig
from teacher_dump.engine import Engine
from teacher_dump.plan import Part
from teacher_dump.prompts import Prepared, Preparer, prepare_ahead
from teacher_dump.records import PartCapture, PartResult, split
from teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)


def make_capture(
    engine: Engine,
    config: DumpConfig,
    teacher: Teacher,
    capture: Capture,
    say: Callable[[str], None] = log.warning,
) -> PartCapture:
    """What runs parts through a started engine; the teacher answers first where it gives the responses."""
    answerer = None
    if capture.responses == "teacher":
        answerer = Answerer(
            engine,
            teacher.processor,
            capture,
            vocab_size=teacher.vocab_size,
            vocab_rows=teacher.vocab_rows,
        )
    return PartCapture(
        engine,
        capture,
        wave=config.max_num_seqs,
        answerer=answerer,
        with_images=config.with_images,
        restarts=config.max_engine_restarts,
        say=say,
    )


def capture_part(
    capture: PartCapture,
    items: Iterator[Prepared | Quarantined],
    bar: Any = None,
    attempt: Attempt | None = None,
) -> PartResult:
    """Records and quarantined samples of one part.

    Args:
        capture: Runs it.
        items: The part's samples, prepared.
        bar: A progress bar to move on, sample by sample.
        attempt: Where samples that kill the engine are written down.
    """
    results = []
    for done in capture.run(items, attempt):
        results += done
        if bar is not None:
            bar.update(len(done))
    return split(results)


def seal_part(writer: CacheWriter, part: Part, result: PartResult) -> PartSeal:
    """Write a part and seal it."""
    return writer.write_part(
        part.index,
        result.records,
        first_sample=part.first_sample,
        num_samples=len(part.samples),
        quarantined=result.quarantined,
    )


def write_part(
    writer: CacheWriter,
    part: Part,
    capture: PartCapture,
    preparer: Preparer,
    *,
    threads: int,
    attempts: AttemptLog,
) -> PartSeal:
    """Prepare, capture and seal one part."""
    items = prepare_ahead(preparer, part.samples.tolist(), threads=threads, ahead=2 * capture.wave)
    with attempts.attempt(part.index) as attempt:
        result = capture_part(capture, items, attempt=attempt)
    seal = seal_part(writer, part, result)
    attempts.forget(part.index)
    return seal
