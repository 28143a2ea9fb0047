"""Hours and bytes of the whole data, from the samples that were really dumped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common.doctor.check import Check, Finding
from common.doctor.host import existing, size
from teacher_dump.config import DumpConfig
from teacher_dump.doctor.speed import Measured
from teacher_dump.plan import choose_part_samples
from teacher_dump.trial import Interval, group_costs, ratio_interval

_DISK_MARGIN = 1.3


def check_whole_data(
    config: DumpConfig, measured: Measured, group_of: dict[str, int], num_samples: int
) -> Check:
    """Extrapolate to all samples, with intervals from the spread of the samples.

    Args:
        config: The dump's settings; `out` is where the level would go.
        measured: Of some samples.
        group_of: Which image, by number, each sample that was drawn belongs to.
        num_samples: Samples of the data.
    """
    sizes = np.bincount(list(group_of.values())).astype(float)
    raw, positions = group_costs(measured.records, group_of, len(sizes))
    share = min(1.0, len(group_of) / num_samples)
    fixed = sum(f.size_bytes for name, f in measured.seal.files.items() if name.endswith("zarr.json"))
    written = sum(f.size_bytes for f in measured.seal.files.values()) - fixed
    parts = -(-num_samples // choose_part_samples(num_samples, config.relation_store))
    num_bytes = ratio_interval(raw, sizes, share=share, seed=config.seed)
    num_bytes = num_bytes.times(written / raw.sum()).times(num_samples, fixed * parts)
    spread = ratio_interval(positions, sizes, share=share, seed=config.seed)
    stations = measured.stations
    of_parts = parts * measured.sealing.per_part
    best = spread.times(max(stations.values()) / positions.sum() * num_samples)
    worst = spread.times(sum(stations.values()) / positions.sum() * num_samples, of_parts)
    free = None if "://" in config.out else shutil.disk_usage(existing(Path(config.out))).free
    return judge_whole_data(num_samples, num_bytes, best, worst, free)


def judge_whole_data(
    num_samples: int, num_bytes: Interval, best: Interval, worst: Interval, free: int | None
) -> Check:
    """Time and bytes against the disk.

    Args:
        num_samples: Samples of the data.
        num_bytes: Of the level.
        best: Seconds, where driver, engine and sealing overlap entirely.
        worst: Seconds, one after another.
        free: Bytes free where the level would go; None for an object store.
    """
    said = (
        f"{num_samples:,} samples: {_span(best.value, worst.value)} on one engine, {size(num_bytes.value)} "
        f"({size(num_bytes.low)} to {size(num_bytes.high)})"
    )
    values: dict[str, Any] = {
        "samples": num_samples,
        "seconds": {"overlapped": _rounded(best), "one_after_another": _rounded(worst)},
        "bytes": _rounded(num_bytes),
        "disk_free_bytes": free,
    }
    wanted = "a disk that holds it" if free is None else f"at most {size(free)} of free disk"
    finding = Finding("whole-data", said, wanted, values)
    if free is not None and _DISK_MARGIN * num_bytes.value > free:
        return finding.fails("make room, give --out another disk, or keep less (--visual-fraction 0.25)")
    return finding.passes()


def _span(least: float, most: float) -> str:
    unit, factor = ("hours", 3600.0) if most >= 3600 else ("minutes", 60.0)
    low, high = least / factor, most / factor
    return f"{low:,.1f} to {high:,.1f} {unit}"


def _rounded(interval: Interval) -> list[float]:
    return [round(each, 1) for each in interval]
