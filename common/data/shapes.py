"""The built-in data: rendered scenes written as LLaVA JSON with PNG files, like a user's own data.

    build/data/shapes-…/
      shapes.json             the settings, to recognise it by
      train.json              per image a caption sample and a sample of several questions
      held_out.json           other images, one sample a question, kind = question type
      images/train/000000.png …

Same settings, same bytes. Scene sets are named by seeds below 500,000; held-out images use
`seed + 500,000`, the shipped teachers were trained on seeds from 1,000,000.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from tqdm import tqdm

from common.data import scenes
from common.errors import ConfigError
from schemas.base import Frozen

CAPTION_PROMPT = "describe the image ."
HELD_OUT_SEED = 500_000
DEFAULT_ROOT = Path("build/data")


class ShapesSettings(Frozen):
    """What the built-in data holds; equal settings give equal files."""

    train: int = Field(1000, ge=1)
    """Images to learn from."""
    held_out: int = Field(300, ge=0)
    """Images to examine on."""
    seed: int = Field(0, ge=0, lt=HELD_OUT_SEED)
    """Names the set."""
    questions: int = Field(6, ge=1, le=12)
    """Questions a training image."""
    noise: float = Field(0.0, ge=0, le=1)
    """Share of wrong answers among the training questions; held-out answers are always right."""


def write_shapes(
    directory: Path,
    *,
    num_images: int,
    seed: int,
    name: str = "train",
    questions_per_image: int = 6,
    label_noise: float = 0.0,
    captions: bool = True,
    one_question_a_sample: bool = False,
) -> Path:
    """Write `<name>.json` and `images/<name>/*.png`; the JSON comes last and at once.

    Args:
        directory: Where to; made if missing.
        num_images: Scenes rendered.
        seed: Names the set; see `common.data.scenes`.
        name: Of the JSON file and the image directory.
        questions_per_image: At most this many.
        label_noise: Share of answers replaced by another one of the same question type.
        captions: Add a caption sample (`kind="caption"`) for every image.
        one_question_a_sample: Give every question its own sample, `kind` its type (for examining),
            instead of one conversation an image (`kind="qa"`).

    Returns:
        The JSON file.
    """
    (directory / "images" / name).mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for index in tqdm(range(num_images), desc=f"render {name}", disable=num_images < 200):
        scene = scenes.scene_at(seed, index)
        image = f"images/{name}/{index:06d}.png"
        _write_if_other(directory / image, png_bytes(scene))
        asked = scenes.questions(scene, questions_per_image, label_noise=label_noise)
        base = {"id": f"{name}-{index:06d}", "image": image}
        if captions:
            entries.append(_entry(base, "caption", "caption", [(CAPTION_PROMPT, scenes.caption(scene))]))
        if one_question_a_sample:
            entries += [
                _entry(base, f"q{number}", question.kind, [(question.text, question.answer)])
                for number, question in enumerate(asked)
            ]
        elif asked:
            entries.append(_entry(base, "qa", "qa", [(question.text, question.answer) for question in asked]))
    path = directory / f"{name}.json"
    _write_at_once(path, json.dumps(entries, indent=1) + "\n")
    return path


def _entry(base: dict[str, str], suffix: str, kind: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        mark = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": f"{base['id']}-{suffix}", "image": base["image"], "kind": kind, "conversations": turns}


def png_bytes(scene: scenes.Scene) -> bytes:
    """The scene's picture as an encoded PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(scenes.draw(scene)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_if_other(path: Path, content: bytes) -> None:
    """Leave an equal file alone: another process may be reading it."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _write_at_once(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def parse_shapes(spec: str) -> tuple[ShapesSettings, str, Path | None]:
    """Read `shapes[:key=value,…]`: settings, the split (`split=train` or `held_out`) and `dir=` if given.

    Raises:
        ConfigError: An unknown key or a value out of range.
    """
    fields: dict[str, str] = {}
    for item in spec.removeprefix("shapes").removeprefix(":").split(","):
        if item:
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"data {spec!r}: found {item!r}, wanted key=value")
            fields[key.strip()] = value.strip()
    split = fields.pop("split", "train")
    directory = fields.pop("dir", None)
    if split not in ("train", "held_out"):
        raise ConfigError(f"data {spec!r}: found split {split!r}, wanted train or held_out")
    try:
        settings = ShapesSettings.model_validate_strings(fields)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join([*ShapesSettings.model_fields, "split", "dir"])
        raise ConfigError(
            f"data {spec!r}: {first['loc'][0]}: {first['msg']}; known keys are {known}"
        ) from error
    return settings, split, None if directory is None else Path(directory).expanduser()


def materialise(spec: str) -> Path:
    """Make sure the built-in data called `spec` is on disk; reuse it when it is complete.

    Args:
        spec: `shapes`, or `shapes:train=2000,seed=3,noise=0.3,split=held_out,dir=…`.

    Returns:
        The split's JSON file.

    Raises:
        ConfigError: The spec is malformed, or `dir` holds other data.
    """
    settings, split, directory = parse_shapes(spec)
    if directory is None:
        directory = DEFAULT_ROOT / _directory_name(settings)
    directory = directory.absolute()
    _claim(directory, settings)
    path = directory / f"{split}.json"
    if path.exists():
        return path
    if split == "held_out":
        return write_shapes(
            directory,
            name="held_out",
            num_images=settings.held_out,
            seed=settings.seed + HELD_OUT_SEED,
            questions_per_image=4,
            captions=False,
            one_question_a_sample=True,
        )
    return write_shapes(
        directory,
        num_images=settings.train,
        seed=settings.seed,
        questions_per_image=settings.questions,
        label_noise=settings.noise,
    )


def _directory_name(settings: ShapesSettings) -> str:
    changed = settings.model_dump(exclude_defaults=True)
    return "-".join(["shapes", *(f"{key}{value}" for key, value in changed.items())])


def _claim(directory: Path, settings: ShapesSettings) -> None:
    """Note the settings in the directory, or check that they are the same."""
    path = directory / "shapes.json"
    wanted = settings.model_dump_json(indent=1) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        names = (entry.name for entry in directory.iterdir())
        others = [name for name in names if name != path.name and not name.startswith(".")]
        if others:
            raise ConfigError(
                f"{directory} holds other data ({others[0]}); give dir= a new or empty directory"
            )
        _write_at_once(path, wanted)
    found = path.read_text("utf-8")
    if found != wanted:
        raise ConfigError(
            f"{directory} holds shapes made with {json.loads(found)}, wanted {json.loads(wanted)}; "
            f"give dir= another directory or remove it"
        )
