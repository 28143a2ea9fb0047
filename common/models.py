"""Names for models: presets, local directories and hub ids, resolved the same way everywhere.

    resolve_model("7b")            llava-hf/llava-onevision-qwen2-7b-ov-hf   a preset
    resolve_model("./my-model")    that directory                            has a config.json
    resolve_model("owner/name")    that hub id

Presets of one family share tokenizer and image processor, so their caches and students fit together.
"""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError

TINY = Path(__file__).parent / "tiny"
FAMILY_OF_TYPE = {
    "llava": "llava-1.5",
    "llava_onevision": "llava-onevision",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
}
"""Family whose presets a model of that `model_type` is compared with first; whether they fit is checked
by their fingerprints. A type that is not here is a family of its own, without presets."""
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that can be loaded."""

    name: str
    """What the user typed."""
    path_or_id: str
    """Directory or hub id, as `from_pretrained` and vLLM take it."""
    revision: str | None
    """Branch, tag or commit of a hub model; None for a directory."""
    family: str
    """Presets of one family fit each other; without a preset, a directory's `model_type` or the hub id."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table."""

    name: str
    """What `--model` and `--student` take."""
    source: str
    """Hub id, or a directory under `common/tiny`."""
    family: str
    """Models that share tokenizer and image processor."""
    size: float
    """Parameters in billions, for choosing the smallest."""
    revision: str | None = "main"
    """Hub revision; None for shipped directories."""


def _hub(family: str, source: str, sizes: dict[str, float], *, prefix: str = "") -> list[Preset]:
    return [Preset(prefix + size, source.format(size), family, billions) for size, billions in sizes.items()]


def _qwen(family: str, name: str, sizes: tuple[int, ...]) -> list[Preset]:
    source = f"Qwen/{name}-{{}}B-Instruct"
    return [Preset(f"{family}-{size}b", source.format(size), family, size) for size in sizes]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        Preset("tiny-student", "tiny-student", "tiny", 0.0005, None),
        Preset("tiny-l1", "tiny-l1", "tiny", 0.0008, None),
        Preset("tiny-l2", "tiny-l2", "tiny", 0.0013, None),
        Preset("tiny", "tiny-l2", "tiny", 0.0013, None),
        *_hub(
            "llava-onevision",
            "llava-hf/llava-onevision-qwen2-{}-ov-hf",
            {"0.5b": 0.9, "7b": 8.0, "72b": 73.0},
        ),
        *_hub("llava-1.5", "llava-hf/llava-1.5-{}-hf", {"7b": 7.1, "13b": 13.4}, prefix="llava-1.5-"),
        *_qwen("qwen2.5-vl", "Qwen2.5-VL", (3, 7, 32, 72)),
        *_qwen("qwen3-vl", "Qwen3-VL", (2, 4, 8, 32)),
    ]
}
"""The table. `main` where no commit is pinned; the dump records the commit that was used."""


def resolve_model(name: str) -> ModelRef:
    """Find the model called `name`: a preset, else a local directory, else a hub id.

    Raises:
        ConfigError: It is none of these, or a directory without a `config.json`.
    """
    if name in PRESETS:
        return _of_preset(name, PRESETS[name])
    path = Path(name).expanduser()
    if path.exists():
        return _of_directory(name, path)
    if _HUB_ID.fullmatch(name):
        return ModelRef(name, name, "main", _family_of_id(name))
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"unknown model {name!r}: found no preset, directory or hub id (owner/name) of that form; "
        f"{hint}presets are {', '.join(PRESETS)}"
    )


def smallest_of_family(family: str) -> ModelRef:
    """The smallest preset of a family: the default student of its teachers.

    Raises:
        ConfigError: No preset has that family.
    """
    members = [preset for preset in PRESETS.values() if preset.family == family]
    if not members:
        known = ", ".join(sorted({preset.family for preset in PRESETS.values()}))
        raise ConfigError(
            f"no preset has family {family!r}; known families: {known}; name a student explicitly"
        )
    smallest = min(members, key=lambda preset: preset.size)
    return _of_preset(smallest.name, smallest)


def family_of_teacher(name: str, model_type: str) -> str:
    """Family of a cache's teacher, which may not be a preset, or may be in a directory of another machine.

    Args:
        name: What the dump called it.
        model_type: `config.model_type`, as the cache's manifest has it.
    """
    try:
        family = resolve_model(name).family
    except ConfigError:
        return _family_of_type(model_type)
    known = {preset.family for preset in PRESETS.values()}
    return family if family in known else _family_of_type(model_type)


def _of_preset(name: str, preset: Preset) -> ModelRef:
    if preset.revision is not None:
        return ModelRef(name, preset.source, preset.revision, preset.family)
    path = TINY / preset.source
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"preset {name!r} should lie in {path}, which has no config.json; "
            f"reinstall cascache, or run `python -m scripts.train_tiny` in its repository"
        )
    return ModelRef(name, str(path), None, preset.family)


def _of_directory(name: str, path: Path) -> ModelRef:
    config = path / "config.json"
    if not config.is_file():
        if (path / "run.json").is_file():
            raise ConfigError(_of_run(path))
        raise ConfigError(
            f"{path} is no model: found no config.json in it; "
            f"wanted a directory written by save_pretrained, a preset ({', '.join(PRESETS)}) or a hub id"
        )
    try:
        model_type = json.loads(config.read_text("utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config} is no model configuration ({error!r}); wanted JSON with `model_type`"
        ) from error
    return ModelRef(
        name, str(path.absolute()), None, _family_of_path(path) or _family_of_type(str(model_type))
    )


def _of_run(path: Path) -> str:
    """What to give in place of a run's directory."""
    if (path / "model" / "config.json").is_file():
        return f"{path} is a run's directory, not a model; give {path / 'model'}"
    return (
        f"{path} is the directory of a run that is not finished: it has no {path / 'model'} yet; "
        "run its student-train command again to finish it"
    )


def _family_of_id(hub_id: str) -> str:
    families = [preset.family for preset in PRESETS.values() if preset.source == hub_id]
    return families[0] if families else hub_id


def _family_of_type(model_type: str) -> str:
    return FAMILY_OF_TYPE.get(model_type, model_type)


def _family_of_path(path: Path) -> str | None:
    return "tiny" if path.resolve().parent == TINY.resolve() else None
