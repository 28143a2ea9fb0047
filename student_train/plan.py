"""What a run will do, decided before any weight is read.

    TrainConfig ──> caches opened ──> student chosen ──> fit checked ──> recipe ──> stages with steps

What the user left open is chosen here and said in one line. Nothing here loads a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cache.layout import identity_sha256
from common.cache.own_samples import OwnSamples
from common.cache.reader import CacheReader
from common.cache.trust import require_root
from common.checkpoint_files import check_checkpoint
from common.compat import require_fit
from common.data.open import open_source, recorded_path
from common.data.source import SampleSource
from common.errors import ConfigError, MismatchError, PartMissing, quote
from common.fingerprint import weights_sha256
from common.models import ModelRef, family_of_teacher, resolve_model, smallest_of_family
from common.pixels import pixels_note
from common.processor import load_processor
from schemas.manifest import Manifest
from student_train.collate import Wanted
from student_train.config import TrainConfig
from student_train.losses.terms import TERMS, Term
from student_train.model import StudentShape, read_shape
from student_train.recipe import PRESETS, STAGES, Recipe, Stage, fit_preset, preset_recipe, read_recipe
from student_train.sampling import Sampler, make_sampler, stage_seed


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of the cascade."""

    path: str
    """Directory of its cache."""
    cache: CacheReader
    """The cache, open."""
    source: SampleSource
    """The samples it was dumped from: their images are read again."""

    @property
    def manifest(self) -> Manifest:
        """The cache's identity."""
        return self.cache.manifest


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage with everything about it decided."""

    level: int
    """Index of its level."""
    number: int
    """Its place within the level."""
    stage: Stage
    """What trains, on what, how."""
    sampler: Sampler
    """Which samples each step sees."""
    num_steps: int
    """Optimiser steps."""
    wanted: Wanted
    """Which targets its batches carry."""

    @property
    def name(self) -> str:
        """`l1/dft`-like name for people."""
        return f"l{self.level + 1}/{self.stage.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, decided."""

    config: TrainConfig
    """What was asked for."""
    student: ModelRef
    """The model that learns."""
    shape: StudentShape
    """What its configuration says."""
    processor: Any
    """Its processor."""
    levels: tuple[Level, ...]
    """The caches, nearest teacher first."""
    stages: tuple[PlannedStage, ...]
    """All stages of all levels, in order."""
    out: Path
    """The run directory."""
    held_out: SampleSource | None
    """Samples to answer after training."""
    notes: tuple[str, ...]
    """Differences that do no harm, written into the run's record."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a killed run to go on, as JSON."""
        return {
            "student": self.student.name,
            "revision": self.student.revision,
            "weights": self._weights_sha256(),
            "caches": {f"l{n + 1}": identity_sha256(level.manifest) for n, level in enumerate(self.levels)},
            "samples": {f"l{n + 1}": level.cache.num_samples for n, level in enumerate(self.levels)},
            "stages": [
                {"level": each.level, "steps": each.num_steps, **each.stage.model_dump(mode="json")}
                for each in self.stages
            ],
            "seed": self.config.seed,
            "precision": self.config.precision,
            "shuffle_blocks": self.config.shuffle_blocks,
            "lora_rank": self.config.lora_rank,
            "ema": self.config.ema,
            "image_grid": self.config.image_grid,
            "overfit_one_batch": self.config.overfit_one_batch,
        }

    def _weights_sha256(self) -> str | None:
        """A directory's weights may change under its name; a hub revision is the hub's to keep."""
        directory = Path(self.student.path_or_id)
        return weights_sha256(directory) if self.student.revision is None and directory.is_dir() else None

    def choices(self) -> str:
        """Say in one line what was chosen."""
        data = ", ".join(dict.fromkeys(level.source.path for level in self.levels))
        return (
            f"student {self.student.name}, cache {' > '.join(level.path for level in self.levels)}, "
            f"data {data}, {len(self.stages)} stages, {self.total_steps} steps, out {self.out}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `describe` says, for machines."""
        return {
            "student": self.student.name,
            "caches": [level.path for level in self.levels],
            "teachers": [level.manifest.teacher.model for level in self.levels],
            "data": [level.source.path for level in self.levels],
            "out": str(self.out),
            "stages": [
                {"name": each.name, "steps": each.num_steps, "samples": each.sampler.num_samples}
                | each.stage.model_dump(mode="json", exclude={"name", "steps"})
                for each in self.stages
            ],
            "total_steps": self.total_steps,
            "fits": True,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """Return a table of levels and stages, and the answer to whether the student fits."""
        lines = [self.choices(), ""]
        for each in self.stages:
            terms = " + ".join(f"{weight:g} {term}" for term, weight in each.stage.terms.items())
            lines.append(
                f"  {each.name:8} {each.num_steps:6} steps x {each.stage.size:<11} "
                f"{each.sampler.num_samples:8} samples  {' + '.join(each.stage.trains):15} "
                f"lr {each.stage.learning_rate:<7g} {terms}"
            )
        fits = [
            f"student fits {level.path} (teacher {level.manifest.teacher.model})" for level in self.levels
        ]
        return "\n".join([*lines, "", *fits, *(f"note: {note}" for note in self.notes)])


def make_plan(config: TrainConfig) -> Plan:
    """Decide everything that can be decided without weights.

    Raises:
        ConfigError: A setting, recipe or path is wrong.
        CacheError: A cache is missing or damaged.
        MismatchError: The student does not fit a cache; names the fields.
    """
    require_pinned(config)
    levels = tuple(open_level(path, config) for path in config.cache)
    held_out = open_source(config.eval, image_root=config.image_root) if config.eval else None
    if config.eval_steps and held_out is None:
        raise ConfigError("--eval-steps needs questions; name held-out samples with --eval")
    student = choose_student(config.student, levels[0])
    if student.revision is None:
        check_checkpoint(Path(student.path_or_id))
    shape = read_shape(student.path_or_id, revision=student.revision)
    processor = load_own_processor(student, config, levels)
    notes = [
        f"{level.path}: {note}"
        for level in levels
        for note in require_fit(
            level.path,
            level.manifest,
            student.name,
            processor,
            vocab_rows=shape.vocab_rows,
            own_grid=config.image_grid == "own",
        )
    ]
    notes += [
        f"{level.path} is not finished: {level.cache.num_samples} of "
        f"{level.manifest.samples.num_samples} samples"
        for level in levels
        if not level.cache.complete
    ]
    recipe = choose_recipe(config.recipe, levels, tiny=shape.is_tiny, own_grid=config.image_grid == "own")
    if config.tokens_per_batch is not None:
        recipe = recipe.with_stages(tokens_per_batch=config.tokens_per_batch)
    names = "-".join(Path(level.path).resolve().name for level in levels)
    out = Path(config.out) if config.out else Path("runs") / f"{Path(student.name).name}-{names}"
    stages = plan_stages(config, levels, recipe)
    notes += [note] if (note := pixels_note(processor)) else []
    notes += stage_notes(stages, lifted=config.recipe is None or config.recipe in PRESETS)
    return Plan(config, student, shape, processor, levels, stages, out, held_out, tuple(notes))


def load_own_processor(student: ModelRef, config: TrainConfig, levels: Sequence[Level]) -> Any:
    """The student's processor: image bounds that no flag sets come from the first level.

    Raises:
        ConfigError: It has no usable processor.
    """
    level = levels[0].manifest if config.image_grid == "teacher" else None
    return load_processor(student.path_or_id, revision=student.revision, options=config, level=level)


def require_pinned(config: TrainConfig) -> None:
    """Hold every cache to the root hash that was pinned for it; their files follow as parts are opened.

    Raises:
        ConfigError: There is not one --expect for each --cache.
        MismatchError: A cache is another one.
    """
    if config.expect and len(config.expect) != len(config.cache):
        raise ConfigError(
            f"{len(config.expect)} --expect for {len(config.cache)} --cache; give one for each, in order"
        )
    for path, root in zip(config.cache, config.expect, strict=False):
        require_root(path, root)


def open_level(path: str, config: TrainConfig) -> Level:
    """Open a cache and the samples it was dumped from.

    The samples are where `--data` says, else in the cache itself, if it keeps image files, else where it
    says the dump found them.

    Raises:
        CacheError: The cache is missing or damaged.
        ConfigError: Nobody knows where the samples are, or they are not there.
        MismatchError: The samples there are not the cache's.
    """
    cache = CacheReader(path, proven=bool(config.expect))
    if not cache.num_samples:
        raise PartMissing(f"{path} holds no finished part yet; run its teacher-dump command again")
    if config.data is None and cache.manifest.with_images and not cache.manifest.without_text:
        return Level(path, cache, OwnSamples(cache))
    found = cache.manifest.data_source
    data = config.data or recorded_path(found.path if found else None)
    if data is None:
        where = f"was dumped from {quote(found.path)}" if found else "does not say where its data is"
        raise ConfigError(f"{path} {where}, which is no file here; name it with --data")
    root = config.image_root or (found.image_root if found and config.data is None else None)
    source = open_source(data, image_root=root)
    known = set(source.sample_ids())
    missing = [sample_id for sample_id in cache.sample_ids if sample_id not in known]
    if missing:
        raise MismatchError(
            f"{len(missing)} of {cache.num_samples} samples of {path} are not in {source.path} (such as "
            f"{missing[0]!r}); point --data at the samples that were dumped"
        )
    return Level(path, cache, source)


def choose_student(name: str | None, level: Level) -> ModelRef:
    """Return the student that was named, or the smallest preset of the teacher's family.

    Raises:
        ConfigError: There is no such model, or the teacher's family has no preset.
    """
    if name is not None:
        return resolve_model(name)
    teacher = level.manifest.teacher
    return smallest_of_family(family_of_teacher(teacher.model, teacher.model_type))


def choose_recipe(name: str | None, levels: Sequence[Level], *, tiny: bool, own_grid: bool = False) -> Recipe:
    """Return the recipe: a preset fitted to the caches, or a file taken at its word.

    Raises:
        ConfigError: No such recipe, or it has another number of levels than there are caches.
    """
    base = "tiny" if tiny else "paper"
    if name is None or name in PRESETS:
        recipe = preset_recipe(name or "cascade", base=base, num_levels=len(levels))
        fitted = [
            fit_preset(stages, level.cache.kinds, available_terms(level.manifest, own_grid=own_grid))
            for stages, level in zip(recipe.levels, levels, strict=True)
        ]
        return Recipe(levels=tuple(fitted))
    recipe = read_recipe(Path(name), base=base)
    if len(recipe.levels) != len(levels):
        raise ConfigError(
            f"recipe {name} has {len(recipe.levels)} levels, there are {len(levels)} caches; "
            f"give one --cache a level"
        )
    for level, stages in zip(levels, recipe.levels, strict=True):
        _require_terms(level, stages, own_grid=own_grid)
    return recipe


def available_terms(manifest: Manifest, *, own_grid: bool = False) -> frozenset[Term]:
    """Return the terms that a cache holds targets for.

    Args:
        manifest: The cache's identity.
        own_grid: Whether the student has image positions of its own, where no distribution was kept.
    """
    positions, relation = manifest.capture.positions, manifest.relation
    has: Mapping[Term, bool] = {
        "ce": True,
        "response_kl": positions != "visual",
        "visual_kl": positions != "response" and manifest.capture.visual_fraction > 0 and not own_grid,
        "relation": relation.store in ("factor", "both") or _relates_hidden(manifest),
    }
    return frozenset(term for term in TERMS if has[term])


def _relates_hidden(manifest: Manifest) -> bool:
    """Raw states are a factor of their own relation; one of the logits would need the teacher's head."""
    return manifest.relation.store == "hidden" and manifest.relation.of == "hidden"


def _require_terms(level: Level, stages: Sequence[Stage], *, own_grid: bool) -> None:
    have = available_terms(level.manifest, own_grid=own_grid)
    where = " at the student's own image positions" if own_grid else ""
    for stage in stages:
        lacking = [term for term in stage.terms if term not in have]
        if lacking:
            raise ConfigError(
                f"stage {stage.name!r} wants {', '.join(lacking)}, but {level.path} holds no targets for it"
                f"{where} (has {', '.join(sorted(have))}); leave the term out, or dump again with it"
            )


def plan_stages(config: TrainConfig, levels: Sequence[Level], recipe: Recipe) -> tuple[PlannedStage, ...]:
    """Give every stage its samples and its number of steps."""
    planned = []
    for number, (level, stages) in enumerate(zip(levels, recipe.levels, strict=True)):
        for place, stage in enumerate(stages):
            sampler = make_sampler(
                level.cache,
                stage,
                seed=stage_seed(config.seed, number, place),
                window_blocks=config.shuffle_blocks,
                where=level.path,
            )
            steps = stage.steps or sampler.steps_of(stage.epochs or 1.0)
            wanted = wanted_targets(level, stage, sampler.seed)
            planned.append(PlannedStage(number, place, stage, sampler, steps, wanted))
    return tuple(planned)


MANY_PASSES = 100
"""Passes over the same samples from which on a stage is worth a note."""


def stage_notes(stages: Sequence[PlannedStage], *, lifted: bool) -> list[str]:
    """Say what of a plan may surprise.

    Args:
        stages: The plan's.
        lifted: Whether filters that select no sample were lifted, as `fit_preset` does.
    """
    notes = []
    for each in stages:
        preset = STAGES["paper"].get(each.stage.name)
        if lifted and preset and preset.kinds and not each.stage.kinds:
            notes.append(f"{each.name} takes all samples: its filter {', '.join(preset.kinds)} selects none")
        passes = each.num_steps / each.sampler.steps_of(1.0)
        if passes >= MANY_PASSES:
            notes.append(f"{each.name} goes over its {each.sampler.num_samples} samples {passes:.0f} times")
    return notes


def wanted_targets(level: Level, stage: Stage, seed: int) -> Wanted:
    """Say which targets a stage needs from its cache.

    Args:
        level: The cache.
        stage: Terms, thinning and temperature.
        seed: The stage's seed.

    Raises:
        ConfigError: The cache holds no normaliser for the temperature, or ids drawn at random, from which
            the divergence has no unbiased estimate.
    """
    capture, divergence = level.manifest.capture, stage.divergence
    if divergence.temperature not in capture.temperatures:
        raise ConfigError(
            f"stage {stage.name!r} wants temperature {divergence.temperature:g}, {level.path} holds "
            f"normalisers for {', '.join(f'{each:g}' for each in capture.temperatures)}; choose one of them, "
            f"or dump again with --temperature {divergence.temperature:g}"
        )
    if capture.sampling != "topk":
        _require_unbiased(level, stage)
    return Wanted(
        terms=frozenset(stage.terms),
        visual_positions=stage.visual_positions_per_image,
        seed=seed,
        temperature=divergence.temperature,
        column=capture.temperatures.index(divergence.temperature),
        hidden_relation=_relates_hidden(level.manifest),
    )


def _require_unbiased(level: Level, stage: Stage) -> None:
    """Only the forward KL at temperature 1 is linear in the teacher's masses, and so unbiased under draws."""
    divergence = stage.divergence
    fits = divergence.kind == "forward_kl" and divergence.tail != "renormalise"
    if {"response_kl", "visual_kl"} & set(stage.terms) and not (fits and divergence.temperature == 1.0):
        raise ConfigError(
            f"stage {stage.name!r} wants {divergence.kind} (tail {divergence.tail}, temperature "
            f"{divergence.temperature:g}), but {level.path} holds ids drawn at random, whose masses are "
            f"unbiased under forward_kl at temperature 1 only; use that, or dump again with the top-k ids"
        )
