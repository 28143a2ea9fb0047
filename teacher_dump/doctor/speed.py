"""How fast each station of a dump is on this machine: driver, engine, sealing; and what the capture costs.

    driver    read, decode, render, tokenise             threads ahead of the engine
    engine    vLLM's image processing, prefill, capture  with and without rows to keep, image caches emptied
    sealing   encode, write, hash, sync                  a thread beside the engine

In a dump they overlap, so the slowest one sets the pace.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.cache.writer import CacheWriter
from common.doctor.check import Check, Finding
from common.doctor.reporter import Reporter
from common.record import Record
from schemas.manifest import Manifest, PartSeal, Quarantined
from teacher_dump.config import DumpConfig
from teacher_dump.engine import Engine, Submission
from teacher_dump.level import engine_settings
from teacher_dump.parts import capture_part, make_capture, seal_part
from teacher_dump.plan import Part
from teacher_dump.prompts import Prepared, Preparer, prepare_ahead
from teacher_dump.public import choose_engine
from teacher_dump.records import PartCapture, PartResult
from teacher_dump.request import CaptureRequest, ImageIdentity, hash_tokens
from teacher_dump.teacher import Teacher

_ROUNDS = 3
_COSTLY = 3.0
"""Ratio of capture to prefill above which something is wrong: a large vocabulary alone gives 1.3 with a
realistic prefill; a tiny model's prefill is as short as the bookkeeping."""
_MUCH_SLOWER = 0.8
_FASTER = {
    "driver": "the engine waits for images and text: more cores, more --threads, or images on a faster disk",
    "sealing": "the engine waits for the disk: one engine per GPU (--workers) seals in parallel, keep fewer "
    "rows (--visual-fraction), or give --out a faster disk",
}
_EMPTY = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class PreparedSamples:
    """The samples that everything is measured on."""

    items: list[Prepared]
    """The usable ones."""
    quarantined: list[Quarantined]
    """The others."""
    indices: NDArray[np.int64]
    """Source indices of all of them."""
    seconds: float
    """Time the driver took for them."""


class Sealing(NamedTuple):
    """Seconds of encoding and writing."""

    per_part: float
    """A part of one sample: files, hashes, waiting for the disk; a dump's parts hold hundreds."""
    samples: float
    """The other samples, on top of that."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, per pass over the same samples."""

    prepared: PreparedSamples
    """The samples, and the driver's time."""
    records: list[Record]
    """The teacher's records of them, before encoding."""
    manifest: Manifest
    """Identity of the small cache."""
    seal: PartSeal
    """Of its one part."""
    start_seconds: float
    """Until the engine was ready."""
    plain_seconds: float
    """Engine, nothing kept: the fastest of a few passes."""
    capture_seconds: float
    """Engine with everything kept, likewise."""
    sealing: Sealing
    """Encoding and writing."""

    @property
    def rows(self) -> int:
        """Rows kept."""
        return self.seal.num_response_rows + self.seal.num_visual_rows

    @property
    def positions(self) -> int:
        """Positions computed."""
        return sum(len(record.token_ids) for record in self.records)

    @property
    def stations(self) -> dict[str, float]:
        """Seconds per pass of each station, without what a part costs however many samples it holds."""
        return {
            "driver": self.prepared.seconds,
            "engine": self.capture_seconds,
            "sealing": self.sealing.samples,
        }


def prepare(preparer: Preparer, indices: NDArray[np.int64], *, threads: int) -> PreparedSamples:
    """Prepare samples as the driver does, and time it."""
    preparer(int(indices[0]))  # warm up: the first sample loads libraries
    began = time.monotonic()
    found = list(prepare_ahead(preparer, indices.tolist(), threads=threads, ahead=len(indices)))
    seconds = time.monotonic() - began
    items = [each for each in found if isinstance(each, Prepared)]
    return PreparedSamples(items, [each for each in found if isinstance(each, Quarantined)], indices, seconds)


def measure(
    config: DumpConfig,
    teacher: Teacher,
    manifest: Manifest,
    prepared: PreparedSamples,
    *,
    place: Path,
    reporter: Reporter,
) -> Measured:
    """Start the engine, run the samples with and without the capture, and seal what came out.

    Args:
        config: The dump's settings.
        teacher: The teacher.
        manifest: Identity of the small cache.
        prepared: The samples.
        place: Where the small cache goes.
        reporter: Receives progress and the check `engine`.

    Raises:
        CascacheError: The engine does not start or stops; the cache cannot be written.
    """
    reporter.progress(f"starting the engine with {teacher.ref.name} ({teacher.dtype})")
    began = time.monotonic()
    with choose_engine(engine_settings(config, teacher, manifest.capture)) as engine:
        start_seconds = time.monotonic() - began
        reporter.check(engine_check(engine, start_seconds))
        reporter.progress(f"capturing {len(prepared.items)} samples, {_ROUNDS} times with and without")
        capture = make_capture(engine, config, teacher, manifest.capture)
        capture_part(capture, iter(prepared.items[:1]))  # warm up: the first sample allocates buffers
        plain, kept = [], []
        for _ in range(_ROUNDS):
            plain.append(_plain_seconds(engine, capture, prepared.items))
            seconds, result = _capture_seconds(engine, capture, prepared.items)
            kept.append(seconds)
    everything = PartResult(result.records, [*prepared.quarantined, *result.quarantined])
    one = PartResult(result.records[:1], [])
    once, _ = _seal_seconds(place.with_name("once"), manifest, one, prepared.indices[:1])
    per_part, _ = _seal_seconds(place.with_name("one"), manifest, one, prepared.indices[:1])
    for name in ("once", "one"):
        shutil.rmtree(place.with_name(name))
    all_seconds, seal = _seal_seconds(place, manifest, everything, prepared.indices)
    sealing = Sealing(min(once, per_part), max(all_seconds - min(once, per_part), 1e-6))
    return Measured(prepared, result.records, manifest, seal, start_seconds, min(plain), min(kept), sealing)


def _seal_seconds(
    place: Path, manifest: Manifest, result: PartResult, indices: NDArray[np.int64]
) -> tuple[float, PartSeal]:
    writer = CacheWriter.open(str(place), manifest)
    began = time.monotonic()
    seal = seal_part(writer, Part(0, 0, indices), result)
    seconds = time.monotonic() - began
    writer.finalize()
    return seconds, seal


def engine_check(engine: Any, seconds: float) -> Check:
    """The check that the engine started."""
    runner = getattr(engine, "runner", "") or "public"
    values = {
        "runner": runner,
        "dtype": engine.dtype,
        "start_seconds": round(seconds, 2),
        "head_dtype": getattr(engine, "head_dtype", "") or engine.dtype,
    }
    said = f"started in {seconds:.1f} s: {engine.dtype}, model runner {runner}"
    return Finding("engine", said, "an engine with the capture in it", values).passes()


def _plain_seconds(engine: Engine, capture: PartCapture, items: list[Prepared]) -> float:
    """The same samples in the same groups, nothing kept of them."""
    submissions = [Submission(_nothing_kept(each), each.prompt, each.pixels) for each in items]
    engine.forget()
    engine.forget_images()
    began = time.monotonic()
    for first in range(0, len(submissions), capture.wave):
        engine.run(submissions[first : first + capture.wave])
    return time.monotonic() - began


def _nothing_kept(item: Prepared) -> CaptureRequest:
    return CaptureRequest(
        key=item.sample_id,
        num_positions=len(item.prompt.token_ids),
        token_sha256=hash_tokens(item.prompt.token_ids),
        images=tuple(
            ImageIdentity(identity, image.start, image.stop)
            for identity, image in zip(item.identities, item.prompt.images, strict=True)
        ),
        response_rows=_EMPTY,
        visual_rows=(None,) * len(item.prompt.images),
    )


def _capture_seconds(engine: Engine, capture: PartCapture, items: list[Prepared]) -> tuple[float, PartResult]:
    engine.forget_images()
    began = time.monotonic()
    result = capture_part(capture, iter(items))
    return time.monotonic() - began, result


def check_capture_cost(measured: Measured) -> Check:
    """Time with everything kept over time with nothing kept."""
    return judge_capture_cost(
        measured.capture_seconds, measured.plain_seconds, positions=measured.positions, rows=measured.rows
    )


def judge_capture_cost(capture: float, plain: float, *, positions: int, rows: int) -> Check:
    """Seconds with everything kept against seconds with nothing kept, of the same samples."""
    values = {
        "capture_seconds": round(capture, 4),
        "prefill_seconds": round(plain, 4),
        "ratio": round(capture / plain, 3),
        "positions": positions,
        "rows": rows,
    }
    said = (
        f"{capture / plain:.2f} × a plain prefill ({positions / capture:,.0f} against "
        f"{positions / plain:,.0f} positions per second)"
    )
    finding = Finding("capture-cost", said, f"at most {_COSTLY:g} ×", values)
    if capture > _COSTLY * plain:
        return finding.warns("keep less: --visual-fraction 0.25, a smaller --visual-topk, or fewer rows")
    return finding.passes()


def check_throughput(measured: Measured) -> Check:
    """Rows per second of each station by itself, and which one is the slowest."""
    return judge_throughput(
        measured.stations,
        rows=measured.rows,
        samples=len(measured.records),
        per_part=measured.sealing.per_part,
    )


def judge_throughput(seconds: dict[str, float], *, rows: int, samples: int, per_part: float) -> Check:
    """Seconds of each station against each other.

    Args:
        seconds: Of `driver`, `engine` and `sealing`, for the same samples.
        rows: Rows kept of them.
        samples: How many.
        per_part: Seconds that sealing a part takes on top.
    """
    rates = {name: rows / each for name, each in seconds.items()}
    slowest = min(rates, key=lambda name: rates[name])
    told = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    values = {
        "rows_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "samples_per_second": {name: round(samples / each, 2) for name, each in seconds.items()},
        "bottleneck": slowest,
        "seal_seconds_per_part": round(per_part, 4),
        "samples": samples,
    }
    said = f"rows per second: {told}; the bottleneck is the {slowest}"
    finding = Finding("throughput", said, "no station much slower than the engine", values)
    if slowest != "engine" and rates[slowest] < _MUCH_SLOWER * rates["engine"]:
        return finding.warns(_FASTER[slowest])
    return finding.passes()
