"""Levels and stages as data: what trains, on which terms, for how long.

    recipe   level 1 (cache l1)   dpt  projector        captions    ce + response_kl + visual_kl + ½ relation
                                  sft  projector + llm  the rest    ce
                                  dft  projector + llm  the rest    ce + response_kl + visual_kl + ½ relation
             level 2 (cache l2)   dft  ...

The student is carried over from stage to stage and from level to level. Freezing rules and weights
are LLaVA-KD's (arXiv 2410.16236); `pt` is the plain alignment stage that the baselines use.
"""

import difflib
import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from common.errors import ConfigError
from schemas.base import Frozen
from student_train.losses.terms import Divergence, Term

ModulePart = Literal["projector", "llm"]


class Stage(Frozen):
    """One stretch of training with one set of frozen weights, terms and learning rate."""

    name: str
    """`dpt`, `sft`, `dft`, `pt`, or a name of your own."""
    trains: tuple[ModulePart, ...] = Field(min_length=1)
    """Which parts learn; the vision tower never does."""
    terms: dict[Term, float] = Field(min_length=1)
    """Weight of every loss term; what is not named is not computed."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    epochs: float | None = Field(1.0, gt=0)
    """Passes over the stage's samples; not with `steps`."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps instead of epochs."""
    batch_size: int = Field(128, ge=1)
    """Samples an optimiser step, over all processes and micro-batches."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Real tokens an optimiser step, instead of `batch_size`: samples of like length go together."""
    kinds: tuple[str, ...] = ()
    """Sample kinds to train on; `!caption` means all but captions; empty means all."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; not applied to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    divergence: Divergence = Divergence()
    """What `response_kl` and `visual_kl` measure, and what becomes of the mass outside the kept ids."""
    learned_weights: tuple[Term, ...] = ()
    """Terms that also learn a factor of their own (uncertainty weighting), on top of their weight."""
    visual_positions_per_image: int | None = Field(None, ge=1)
    """Random subset of each image's cached positions that `visual_kl` uses; None means all."""

    @model_validator(mode="after")
    def _length_is_given_once(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"stage {self.name!r} needs either epochs or steps, found {_lengths(self)}")
        return self

    @model_validator(mode="after")
    def _learned_weights_are_of_terms(self) -> Self:
        unknown = [term for term in self.learned_weights if term not in self.terms]
        if unknown:
            raise ValueError(
                f"stage {self.name!r} learns weights of {unknown}, its terms are {list(self.terms)}"
            )
        return self

    def selects(self, kind: str | None) -> bool:
        """Say whether a sample of this kind belongs to the stage."""
        wanted = [name for name in self.kinds if not name.startswith("!")]
        refused = [name[1:] for name in self.kinds if name.startswith("!")]
        return kind not in refused and (not wanted or kind in wanted)

    @property
    def size(self) -> str:
        """Size of a batch, for people."""
        return f"{self.batch_size}" if self.tokens_per_batch is None else f"{self.tokens_per_batch} tokens"


class Recipe(Frozen):
    """What happens at each level, in order."""

    levels: tuple[tuple[Stage, ...], ...]
    """One list of stages per cache."""

    def with_stages(self, **changes: Any) -> "Recipe":
        """Return the recipe with some settings of every stage changed."""
        return Recipe(
            levels=tuple(
                tuple(stage.model_copy(update=changes) for stage in stages) for stages in self.levels
            )
        )


_DISTIL: Final[dict[Term, float]] = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
_BOTH: Final[tuple[ModulePart, ...]] = ("projector", "llm")

_PAPER = (
    Stage(name="pt", trains=("projector",), terms={"ce": 1.0}, learning_rate=1e-3, batch_size=256,
          kinds=("caption",)),
    Stage(name="dpt", trains=("projector",), terms=_DISTIL, learning_rate=1e-3, batch_size=256,
          kinds=("caption",)),
    Stage(name="sft", trains=_BOTH, terms={"ce": 1.0}, learning_rate=2e-5, kinds=("!caption",)),
    Stage(name="dft", trains=_BOTH, terms=_DISTIL, learning_rate=2e-5, kinds=("!caption",)),
)  # fmt: skip

_TINY_CHANGES = {"epochs": None, "batch_size": 32, "betas": (0.9, 0.98), "weight_decay": 0.05, "warmup": 0.05}
_TINY_ALIGN = {**_TINY_CHANGES, "steps": 150, "learning_rate": 6e-3}
_TINY_TUNE = {**_TINY_CHANGES, "steps": 400, "learning_rate": 3e-3}


def _stages(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Stage]:
    return {stage.name: stage.model_copy(update=dict(changes.get(stage.name, {}))) for stage in _PAPER}


STAGES: Final[Mapping[str, Mapping[str, Stage]]] = {
    "paper": _stages({}),
    "tiny": _stages({"pt": _TINY_ALIGN, "dpt": _TINY_ALIGN, "sft": _TINY_TUNE, "dft": _TINY_TUNE}),
}
"""The stages by size of student: `paper` for real ones, `tiny` for models of a few hundred kilobytes."""

PRESETS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "cascade": (("dpt", "sft", "dft"), ("dft",)),
    "pt-sft": (("pt", "sft"),),
    "pt-sft-sft": (("pt", "sft", "sft"),),
}
"""Recipes by name: stages of the first level, then of every later one."""


def preset_recipe(name: str, *, base: str, num_levels: int) -> Recipe:
    """Build a named recipe for a number of levels.

    Args:
        name: A key of `PRESETS`.
        base: A key of `STAGES`.
        num_levels: Caches to train from.

    Raises:
        ConfigError: The recipe is unknown, or says nothing about later levels.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"recipe {name!r} is neither a file nor one of {', '.join(PRESETS)}; name one of them"
        )
    levels = PRESETS[name]
    if num_levels > 1 and len(levels) == 1:
        raise ConfigError(f"recipe {name!r} is for one cache, found {num_levels}; give one --cache")
    chosen = [levels[0], *[levels[-1]] * (num_levels - 1)]
    return Recipe(levels=tuple(tuple(STAGES[base][stage] for stage in names) for names in chosen))


def read_recipe(path: Path, *, base: str) -> Recipe:
    """Read a recipe from a TOML file.

    A level's `stages` are names, or tables that change a named stage:

        base = "tiny"
        [[levels]]
        stages = ["dpt", "sft", {name = "dft", steps = 800, terms = {ce = 1, response_kl = 1}}]

    Args:
        path: The TOML file.
        base: Where named stages come from unless the file's own `base` says otherwise.

    Raises:
        ConfigError: The file is missing or malformed, or names an unknown stage or setting.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(path), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"recipe file {path} does not exist; {hint}name a file or one of {', '.join(PRESETS)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}; fix it") from error
    unknown = set(table) - {"base", "levels"}
    if unknown or not isinstance(table.get("levels"), list):
        raise ConfigError(
            f"recipe {path} wants [[levels]] and an optional base, found {sorted(table)}; fix it"
        )
    named = STAGES.get(table.get("base", base))
    if named is None:
        raise ConfigError(f"recipe {path} has base {table['base']!r}, wanted one of {', '.join(STAGES)}")
    levels = [
        tuple(_read_stage(entry, named, path) for entry in level.get("stages", ()))
        for level in table["levels"]
    ]
    return Recipe(levels=tuple(levels))


def _read_stage(entry: object, named: Mapping[str, Stage], path: Path) -> Stage:
    changes = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(changes, dict) or "name" not in changes:
        raise ConfigError(f"recipe {path} has a stage {entry!r}, wanted a name or a table with a name")
    like = changes.pop("like", changes["name"])
    if like not in named:
        raise ConfigError(f"recipe {path} has stage {like!r}, known are {', '.join(named)}; say `like = ...`")
    if "steps" in changes:
        changes.setdefault("epochs", None)
    elif "epochs" in changes:
        changes["steps"] = None
    try:
        return Stage.model_validate({**named[like].model_dump(), **changes})
    except ValidationError as error:
        problems = "; ".join(map(_describe, error.errors(include_url=False)))
        raise ConfigError(f"recipe {path}, stage {changes['name']!r}: {problems}; fix it") from error


def _describe(problem: Any) -> str:
    """One problem of pydantic's, as a person would say it."""
    place = [str(each) for each in problem["loc"] if each != "[key]"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], [*Stage.model_fields, *Divergence.model_fields], n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(Stage.model_fields)}"
        return f"unknown field {'.'.join(place)!r}{hint}"
    return f"{'.'.join(place)}: {problem['msg']}"


def fit_preset(
    stages: Sequence[Stage], kinds: Collection[str | None], terms: Collection[Term]
) -> tuple[Stage, ...]:
    """Adapt a preset's stages to what a cache holds.

    Args:
        stages: Stages of one level.
        kinds: Kinds that the level's cache holds; a filter that would select none of them is lifted.
        terms: Terms that the cache has targets for; others are left out.
    """
    return tuple(
        stage.model_copy(
            update={
                "kinds": stage.kinds if any(stage.selects(kind) for kind in kinds) else (),
                "terms": {term: weight for term, weight in stage.terms.items() if term in terms},
            }
        )
        for stage in stages
    )


def recipe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """List where two nested settings differ, one `path: found -> wanted` line each.

    Args:
        found: The earlier settings, as JSON holds them.
        wanted: The present ones.
        path: Prefix of every line, for the recursion.
    """
    lines = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += recipe_differences(old, new, f"{path}{key}.")
        elif isinstance(old, list) and isinstance(new, list):
            lines += recipe_differences(_numbered(old), _numbered(new), f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return lines


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}


def _lengths(stage: Stage) -> str:
    return f"epochs={stage.epochs}, steps={stage.steps}"
