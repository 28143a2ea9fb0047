"""What a dump will cost, from a few prepared samples: bytes, time, and whether the disk holds it."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.source import SampleSource
from common.errors import CacheError, DataError
from schemas.manifest import Quarantined
from teacher_dump.config import DumpConfig
from teacher_dump.image_sizes import ImageSizes, measure_sizes
from teacher_dump.level import longest
from teacher_dump.plan import Part, Plan
from teacher_dump.prompts import Prepared, Preparer
from teacher_dump.teacher import Teacher

_MEASURED_SAMPLES = 16
_DISK_MARGIN = 1.3


@dataclass(frozen=True, slots=True)
class Measure:
    """Averages over a few prepared samples."""

    positions: float
    """Expanded positions per sample."""
    response_rows: float
    """Response rows per sample."""
    image_positions: float
    """Positions per image; 0 when no sample has one."""
    images: float = 0.0
    """Images per sample."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a dump will cost. Rough: sizes within a factor of two."""

    samples: int
    """Samples still to dump."""
    positions: int
    """Positions the teacher computes."""
    images: int
    """Images whose knowledge is kept."""
    size_bytes: int
    """Bytes written."""
    seconds: float | None
    """Time, where the size of the teacher is known."""


def estimate(
    config: DumpConfig, measure: Measure, *, samples: int, images: int, hidden_size: int, rate: float | None
) -> Estimate:
    """Extrapolate from averages.

    Args:
        config: What is kept.
        measure: Averages of a few samples.
        samples: Samples still to dump.
        images: Distinct images among them.
        hidden_size: D of the teacher.
        rate: Positions a second, if known.
    """
    response = (
        measure.response_rows * _row_bytes(config.topk, config.profile)
        if "response" in config.positions
        else 0
    )
    image = 0.0
    if "visual" in config.positions:
        rows = measure.image_positions * config.visual_fraction
        image = rows * _row_bytes(config.visual_topk or config.topk, config.profile)
        image += measure.image_positions * _state_bytes(config, hidden_size)
    positions = round(samples * measure.positions)
    size = samples * (response + 2 * measure.positions) + images * image
    return Estimate(samples, positions, images, round(size), positions / rate if rate else None)


def _row_bytes(topk: int, profile: str) -> float:
    """Bytes a row: ids and logits as measured on simulated teachers, tail and normaliser."""
    return (1.7 * topk + 8) * (1.0 if profile == "pcodec" else 1.4)


def _state_bytes(config: DumpConfig, hidden_size: int) -> float:
    """Bytes an image position besides its rows."""
    raw = hidden_size * {"bfloat16": 2, "float32": 4, "int8": 1}[config.hidden_encoding]
    factor = 1.2 * min(24, config.relation_max_rank)
    return {"factor": factor, "hidden": raw, "both": factor + raw, "none": 0}[config.relation_store]


def describe(
    config: DumpConfig,
    teacher: Teacher,
    plan: Plan,
    todo: list[Part],
    preparer: Preparer,
    source: SampleSource,
) -> dict[str, Any]:
    """The plan and its estimate, as JSON types."""
    indices = np.concatenate([part.samples for part in todo])
    answer = config.max_new_tokens if config.teacher_answers else 0
    averages, sizes = measure(preparer, indices, longest_answer=answer), None
    if averages.images:
        sizes = measure_sizes(teacher.processor, source, indices)
        averages = averages if sizes is None else with_sizes(averages, sizes)
    keys = np.asarray(source.image_keys())[indices]
    measured = estimate(
        config,
        averages,
        samples=len(indices),
        images=len(np.unique(keys[keys != 0])),
        hidden_size=teacher.hidden_size,
        rate=teacher.rate(),
    )
    return {
        "teacher": teacher.ref.name,
        "dtype": teacher.dtype,
        "data": config.data,
        "out": config.out,
        "parts": len(todo),
        "part_samples": plan.part_samples,
        **_rounded(measured),
        "image_positions": None if sizes is None else {**asdict(sizes), "mean": round(sizes.mean, 1)},
        "max_len": longest(config, teacher),
        "disk_free_bytes": _free_bytes(config.out),
    }


def measure(preparer: Preparer, indices: NDArray[np.int64], *, longest_answer: int = 0) -> Measure:
    """Averages over a few samples, evenly spaced.

    Args:
        preparer: Prepares them.
        indices: Samples to choose from.
        longest_answer: Tokens of a response that the teacher is still to give, at most.

    Raises:
        DataError: None of them can be used.
    """
    places = np.unique(np.linspace(0, len(indices) - 1, _MEASURED_SAMPLES).astype(int))
    found = [preparer(int(indices[place])) for place in places]
    usable = [each.prompt for each in found if isinstance(each, Prepared)]
    if not usable:
        first = found[0]
        assert isinstance(first, Quarantined)
        raise DataError(
            f"none of {len(found)} samples tried can be used; the first: {first.detail}", reason=first.reason
        )
    images = [image.stop - image.start for prompt in usable for image in prompt.images]
    responses = [
        span.stop - span.start for prompt in usable for span in prompt.spans if span.kind == "response"
    ]
    return Measure(
        positions=float(np.mean([len(prompt.token_ids) for prompt in usable])) + longest_answer,
        response_rows=sum(responses) / len(usable) + longest_answer,
        image_positions=float(np.mean(images)) if images else 0.0,
        images=len(images) / len(usable),
    )


def with_sizes(averages: Measure, sizes: ImageSizes) -> Measure:
    """The same averages with images counted from many headers instead of a few prepared samples."""
    text = averages.positions - averages.images * averages.image_positions
    positions = text + sizes.per_sample * sizes.mean
    return replace(averages, positions=positions, image_positions=sizes.mean, images=sizes.per_sample)


def check_disk(config: DumpConfig, described: dict[str, Any]) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        CacheError: With both sizes.
    """
    wanted, free = _DISK_MARGIN * described["size_bytes"], described["disk_free_bytes"]
    if free is not None and wanted > free:
        raise CacheError(
            f"{config.out} needs about {wanted / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "make room, give --out another disk, or keep less (--visual-topk, --visual-fraction)"
        )


def _free_bytes(out: str) -> int | None:
    """Free space where the cache will be written; an object store has no limit."""
    return None if "://" in out else shutil.disk_usage(_existing(Path(out))).free


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _rounded(measured: Estimate) -> dict[str, Any]:
    values = asdict(measured)
    values["seconds"] = None if measured.seconds is None else round(measured.seconds, 1)
    return values
