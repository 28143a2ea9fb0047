"""What a dump will cost, from samples that are really dumped, into a directory that is thrown away.

    plan ──random images, each with all its samples──> engine ──> writer ──> bytes, seconds, unusable share
                                                                             × samples of the plan

Whole images are drawn, because an image's knowledge is kept and computed once for all its samples. The
interval says how much images differ (a bootstrap over them, 95 %), not how much the machine's speed does.

Axes: G groups, one an image or a sample without one.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.cache.writer import CacheWriter
from common.data.source import SampleSource
from common.errors import DataError
from common.record import Record, TopK, VisualRecord
from common.streams import key_of, stream
from schemas.manifest import PartSeal
from teacher_dump.config import DumpConfig
from teacher_dump.level import engine_settings, make_manifest
from teacher_dump.parts import capture_part, make_capture, seal_part
from teacher_dump.plan import Part, Plan, make_plan
from teacher_dump.prompts import Preparer, prepare_ahead
from teacher_dump.public import choose_engine
from teacher_dump.records import PartResult
from teacher_dump.teacher import Teacher

_RESAMPLES = 2000
_Z = 1.96

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and the range that holds it 19 times out of 20."""

    value: float
    """The estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def times(self, factor: float, plus: float = 0.0) -> "Interval":
        """Scaled and moved."""
        return Interval(*(plus + factor * each for each in self))


class Taken(NamedTuple):
    """What the trial took."""

    result: PartResult
    """Its records."""
    seal: PartSeal
    """Of the one part they were written to."""
    start_seconds: float
    """Until the engine was ready."""
    seconds: float
    """Preparing, computing, writing."""


def run_trial(
    config: DumpConfig, teacher: Teacher, plan: Plan, preparer: Preparer, source: SampleSource
) -> dict[str, Any]:
    """Dump random samples of the plan and extrapolate to all of it, as JSON types.

    Raises:
        DataError: None of the samples can be used.
        EngineError: The engine does not start.
    """
    assert config.sample_estimate is not None
    keys = np.asarray(source.image_keys())[plan.order]
    chosen, groups = draw_groups(keys, config.sample_estimate, seed=config.seed)
    taken = _dump(config, teacher, plan.order[chosen], preparer, source)
    if not taken.result.records:
        first = taken.result.quarantined[0]
        raise DataError(f"none of {len(chosen)} samples can be used: {first.detail}", reason=first.reason)
    group_of = dict(zip([source.sample_ids()[i] for i in plan.order[chosen]], groups.tolist(), strict=True))
    sizes = np.bincount(groups).astype(float)
    raw, positions = group_costs(taken.result.records, group_of, len(sizes))
    share = len(chosen) / len(plan.order)
    fixed = sum(file.size_bytes for name, file in taken.seal.files.items() if name.endswith("zarr.json"))
    written = sum(file.size_bytes for file in taken.seal.files.values()) - fixed
    num_bytes = ratio_interval(raw, sizes, share=share, seed=config.seed).times(written / raw.sum())
    seconds = ratio_interval(positions, sizes, share=share, seed=config.seed)
    seconds = seconds.times(taken.seconds / positions.sum())
    return {
        "samples": len(chosen),
        "size_bytes": [round(each) for each in num_bytes.times(len(plan.order), fixed * plan.num_parts)],
        "seconds": [round(each, 3) for each in seconds.times(len(plan.order))],
        "start_seconds": round(taken.start_seconds, 1),
        "quarantine_share": [
            round(each, 4) for each in share_interval(len(taken.result.quarantined), len(chosen))
        ],
    }


def draw_groups(
    image_keys: NDArray[np.int64], count: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random images with all their samples, until there are `count` samples.

    Args:
        image_keys: [S] equal for samples of one image, 0 for samples without one.
        count: Samples wanted, at least.
        seed: Of the draw.

    Returns:
        [n] rising indices of samples, and [n] which of G groups each belongs to.
    """
    _, firsts, same = np.unique(image_keys, return_index=True, return_inverse=True)
    first = np.where(image_keys == 0, np.arange(len(image_keys)), firsts[same])
    _, group = np.unique(first, return_inverse=True)
    order = stream(seed, key_of("sample-estimate")).permutation(int(group.max()) + 1)
    sizes = np.bincount(group)[order]
    enough = int(np.searchsorted(np.cumsum(sizes), count)) + 1
    chosen = np.flatnonzero(np.isin(group, order[:enough]))
    _, renumbered = np.unique(group[chosen], return_inverse=True)
    return chosen, renumbered


def _dump(
    config: DumpConfig,
    teacher: Teacher,
    samples: NDArray[np.int64],
    preparer: Preparer,
    source: SampleSource,
) -> Taken:
    plan = make_plan(np.zeros(len(samples), np.int64), part_samples=len(samples), store=config.relation_store)
    manifest = make_manifest(config, source, teacher, plan)
    with tempfile.TemporaryDirectory(prefix="cascache-trial-") as place:
        writer = CacheWriter.open(str(Path(place) / "trial"), manifest)
        begun = time.monotonic()
        with choose_engine(engine_settings(config, teacher, manifest.capture)) as engine:
            capture = make_capture(engine, config, teacher, manifest.capture)
            capture_part(capture, iter([preparer(int(samples[0]))]))  # what the first sample loads and builds
            ready = time.monotonic()
            items = prepare_ahead(
                preparer, samples.tolist(), threads=config.threads, ahead=2 * config.max_num_seqs
            )
            result = capture_part(capture, items)
            seal = seal_part(writer, Part(0, 0, samples), result)
            done = time.monotonic()
    return Taken(result, seal, ready - begun, done - ready)


def group_costs(records: list[Record], group_of: dict[str, int], num_groups: int) -> tuple[Floats, Floats]:
    """[G] bytes in memory of what is kept, and [G] positions; an image that records share counts once."""
    raw, positions = np.zeros(num_groups), np.zeros(num_groups)
    seen: set[str] = set()
    for record in records:
        group = group_of[record.sample_id]
        positions[group] += len(record.token_ids)
        raw[group] += record.token_ids.nbytes + _rows_bytes(record.response)
        for image in record.visual:
            if image.key not in seen:
                seen.add(image.key)
                raw[group] += _image_bytes(image)
    return raw, positions


def _rows_bytes(rows: TopK | None) -> int:
    return 0 if rows is None else rows.token_ids.nbytes + rows.logprobs.nbytes


def _image_bytes(image: VisualRecord) -> int:
    held = [each.nbytes for each in (image.hidden, image.factor) if each is not None]
    return _rows_bytes(image.topk) + sum(held) + len(image.encoded or b"")


def ratio_interval(costs: Floats, sizes: Floats, *, share: float, seed: int) -> Interval:
    """Cost a sample, from groups of samples drawn at random.

    Args:
        costs: [G] of each group.
        sizes: [G] samples of each group.
        share: Of all samples that these are; the interval closes when it is 1.
        seed: Of the bootstrap.
    """
    value = float(costs.sum() / sizes.sum())
    draws = stream(seed, key_of("bootstrap")).integers(len(sizes), size=(_RESAMPLES, len(sizes)))
    found = costs[draws].sum(-1) / sizes[draws].sum(-1)
    low, high = np.quantile(found, [0.025, 0.975])
    narrow = math.sqrt(max(0.0, 1 - share))
    return Interval(value, value - narrow * (value - float(low)), value + narrow * (float(high) - value))


def share_interval(bad: int, count: int) -> Interval:
    """Share of unusable samples, with Wilson's interval."""
    share = bad / count
    scale = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
