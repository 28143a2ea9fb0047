"""The student's checks: whether it fits, whether the fused losses are correct, how fast a step is."""

from dataclasses import replace
from pathlib import Path

from common.cache.layout import METADATA
from common.doctor.check import Check, Finding
from common.doctor.config import DoctorConfig, shared_settings
from common.doctor.reporter import Reporter
from common.models import resolve_model, smallest_of_family
from student_train.config import TrainConfig
from student_train.doctor.losses import check_losses
from student_train.doctor.stand_in import write_stand_in
from student_train.doctor.step import check_step
from student_train.plan import Plan, PlannedStage, make_plan, wanted_targets
from student_train.sampling import make_sampler
from student_train.train import Run

_BATCH = 8
_STEPS = 4
MADE_UP = "made-up targets (no teacher here)"


def check_student(config: DoctorConfig, reporter: Reporter) -> None:
    """Make the checks of this half.

    Raises:
        CascacheError: What training with these settings would end with.
    """
    place = Path(config.keep or ".")
    cache, made_up = _find_cache(config, place, reporter)
    shared = shared_settings(config, TrainConfig)
    own = {"cache": (cache,), "out": str(place / "run"), "tensorboard": False, "restart": True}
    train = TrainConfig.model_validate(shared | own)
    plan = _one_stage(make_plan(train))
    reporter.check(_check_fit(plan, made_up))
    reporter.progress(f"loading student {plan.student.name}")
    with Run(plan) as run:
        planned = plan.stages[0]
        trainer = run.begin(0, planned)
        inputs = [each for each, _ in run.read(planned)]
        reporter.progress("comparing fused and eager losses")
        reporter.check(check_losses(run, trainer, inputs[0]))
        reporter.progress(f"training {len(inputs)} steps of {_BATCH} samples")
        reporter.check(check_step(run, trainer, inputs, note=MADE_UP if made_up else ""))


def _find_cache(config: DoctorConfig, place: Path, reporter: Reporter) -> tuple[str, bool]:
    """The cache to train on, and whether its targets are made up."""
    if config.cache is not None:
        return config.cache, False
    left = place / "l1"
    if (left / METADATA).is_file():
        return str(left), False
    ref = resolve_model(config.student) if config.student else None
    ref = ref or smallest_of_family(resolve_model(config.model).family)
    reporter.progress("no teacher's cache here: making targets up")
    return str(write_stand_in(ref, config, place / "stand-in", num_samples=_BATCH)), True


def _one_stage(plan: Plan) -> Plan:
    """The plan's last stage alone, a few small steps of it: with the cascade's recipe that is `dft`."""
    last, level = plan.stages[-1], plan.levels[0]
    size = min(_BATCH, level.cache.num_samples)
    stage = last.stage.model_copy(
        update={"epochs": None, "steps": _STEPS, "batch_size": size, "tokens_per_batch": None, "kinds": ()}
    )
    sampler = make_sampler(
        level.cache,
        stage,
        seed=plan.config.seed,
        window_blocks=plan.config.shuffle_blocks,
        where=level.path,
    )
    planned = PlannedStage(0, 0, stage, sampler, _STEPS, wanted_targets(level, stage, sampler.seed))
    return replace(plan, stages=(planned,))


def _check_fit(plan: Plan, made_up: bool) -> Check:
    level = plan.levels[0]
    teacher = MADE_UP if made_up else f"cache of {level.manifest.teacher.model}"
    stage = plan.stages[0].stage
    values = {
        "student": plan.student.name,
        "model_type": plan.shape.model_type,
        "vocab_rows": plan.shape.vocab_rows,
        "samples": level.cache.num_samples,
        "terms": dict(stage.terms),
        "trains": list(stage.trains),
        "notes": [note for note in plan.notes if note.startswith(level.path)],
    }
    said = f"{plan.student.name} fits the {teacher}"
    return Finding("fit", said, "equal tokenizer, template, image settings and vocabulary", values).passes()
