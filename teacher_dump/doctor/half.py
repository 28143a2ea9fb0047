"""The teacher's checks, in the order of a dump with these settings."""

from pathlib import Path

import numpy as np

from common.doctor.check import Check
from common.doctor.config import DoctorConfig, shared_settings
from common.doctor.reporter import Reporter
from common.errors import DataError
from common.models import resolve_model
from teacher_dump.asking import open_data
from teacher_dump.config import DumpConfig
from teacher_dump.doctor.agreement import check_agreement
from teacher_dump.doctor.extrapolate import check_whole_data
from teacher_dump.doctor.speed import Measured, check_capture_cost, check_throughput, measure, prepare
from teacher_dump.level import check_settings, choose_out, longest, make_manifest
from teacher_dump.plan import make_plan
from teacher_dump.prompts import Preparer
from teacher_dump.teacher import Teacher, find_teacher
from teacher_dump.trial import draw_groups

SMALL_CACHE = "l1"
"""Name of the small cache in `--keep`."""


def check_teacher(config: DoctorConfig, reporter: Reporter) -> None:
    """Make the checks of this half.

    Raises:
        CascacheError: What a dump with these settings would end with.
    """
    dump = DumpConfig.model_validate(shared_settings(config, DumpConfig) | {"out": config.out})
    source = open_data(dump)
    teacher = find_teacher(resolve_model(dump.model), dtype=dump.dtype, with_weights=True, options=dump)
    check_settings(dump, teacher, source)
    preparer = Preparer(source, teacher.processor, max_len=longest(dump, teacher))
    keys = np.asarray(source.image_keys())
    chosen, groups = draw_groups(keys, max(config.samples, config.compare), seed=dump.seed)
    prepared = prepare(preparer, chosen, threads=dump.threads)
    if not prepared.items:
        first = prepared.quarantined[0]
        raise DataError(f"none of {len(chosen)} samples can be used: {first.detail}", reason=first.reason)
    reporter.progress(f"hashing data and weights of {teacher.ref.name}")
    plan = make_plan(np.zeros(len(chosen), np.int64), part_samples=len(chosen), store=dump.relation_store)
    manifest = make_manifest(dump, source, teacher, plan)
    place = Path(config.keep or ".") / SMALL_CACHE
    measured = measure(dump, teacher, manifest, prepared, place=place, reporter=reporter)
    reporter.check(check_capture_cost(measured))
    reporter.check(check_throughput(measured))
    out = dump.model_copy(update={"out": choose_out(dump.out, None)})
    of_sample = dict(zip([source.sample_ids()[index] for index in chosen], groups.tolist(), strict=True))
    reporter.check(check_whole_data(out, measured, of_sample, len(source)))
    reporter.check(_agreement(config, teacher, measured, reporter))


def _agreement(config: DoctorConfig, teacher: Teacher, measured: Measured, reporter: Reporter) -> Check:
    return check_agreement(
        teacher,
        measured.records[: config.compare],
        {each.sample_id: each.pixels for each in measured.prepared.items},
        manifest=measured.manifest,
        reporter=reporter,
    )
