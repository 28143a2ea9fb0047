"""Data for a teacher that answers itself: several draws of one sample, or new questions on bare images.

    photos/ or train.json ── images ─┐
    questions.txt ─── drawn per image ┴─> asked-3f9a….jsonl      one line a question, images by path
                                            "a.png#1"  <image> How many dogs are there?
                                            "a.png#2"  <image> What stands on the left?

The file is written beside the cache before anything is dumped, and is the level's data from then on: it
has the fingerprint that the level is bound to, the ids that records carry, and the images that a student
reads again. Which questions an image gets depends on (seed, image) alone.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.open import open_source
from common.data.source import SampleSource
from common.errors import ConfigError, DataError
from common.streams import key_of, stream
from schemas.sample import ImageRef, Sample
from teacher_dump.config import DumpConfig

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


def open_data(config: DumpConfig) -> SampleSource:
    """The samples that a dump covers; written down first where they are new.

    Raises:
        ConfigError: There are no questions, no images, or no such data.
    """
    if config.ask is not None:
        root, images = _images(config)
        questions = read_questions(Path(config.ask))
        lines: Iterator[dict[str, Any]] = asked(
            images, questions, asks=config.asks_per_image, draws=config.response_samples, seed=config.seed
        )
        return open_source(str(_write(lines, _place(config.out))), image_root=root)
    source = open_source(config.data, image_root=config.image_root)
    if config.response_samples == 1:
        return source
    lines = repeated(source, config.response_samples)
    return open_source(str(_write(lines, _place(config.out))), image_root=source.image_root)


def read_questions(path: Path) -> list[str]:
    """Questions of a text file, one a line; blank lines are skipped.

    Raises:
        ConfigError: There is no such file, or it holds none.
    """
    try:
        questions = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--ask {path} cannot be read ({error}); give a text file with a question a line"
        ) from error
    if not questions:
        raise ConfigError(f"--ask {path} holds no question; write one a line")
    return questions


def asked(
    images: Iterator[ImageRef], questions: list[str], *, asks: int, draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Entries of messages: for each image once, `asks` different questions, each `draws` times.

    Args:
        images: Images, repeated ones included.
        questions: To draw from; all are asked where there are fewer than `asks`.
        asks: Questions an image.
        draws: Answers wanted of each.
        seed: Of the draws.
    """
    seen: set[str] = set()
    for image in images:
        name = image.path or hashlib.sha256(image.data or b"").hexdigest()
        if name in seen:
            continue
        seen.add(name)
        chosen = stream(seed, key_of(name)).permutation(len(questions))[:asks]
        for number, place in enumerate(chosen, 1):
            content = [{"type": "image"}, {"type": "text", "text": questions[place]}]
            entry = {
                "id": f"{name}#{number}",
                "images": [_reference(image)],
                "messages": [{"role": "user", "content": content}],
            }
            yield from _drawn(entry, draws)


def repeated(source: SampleSource, draws: int) -> Iterator[dict[str, Any]]:
    """Entries of messages: every sample `draws` times, as `id`, `id~2`, `id~3`.

    A sample that cannot be used stays one entry that cannot be used, for the quarantine to name.
    """
    for index, sample_id in enumerate(source.sample_ids()):
        try:
            sample = source[index]
        except DataError as error:
            yield {"id": sample_id, "unusable": str(error), "reason": error.reason}
            continue
        yield from _drawn(_entry(sample), draws)


def _drawn(entry: dict[str, Any], draws: int) -> Iterator[dict[str, Any]]:
    for number in range(1, draws + 1):
        yield entry if number == 1 else {**entry, "id": f"{entry['id']}~{number}"}


def _entry(sample: Sample) -> dict[str, Any]:
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in sample.turns
    ]
    entry: dict[str, Any] = {"id": sample.sample_id, "messages": messages}
    if sample.images:
        entry["images"] = [_reference(image) for image in sample.images]
    return entry if sample.kind is None else {**entry, "kind": sample.kind}


def _reference(image: ImageRef) -> str:
    if image.path is not None:
        return image.path
    return "data:;base64," + base64.b64encode(image.data or b"").decode()


def _images(config: DumpConfig) -> tuple[str | None, Iterator[ImageRef]]:
    """Image root and all images of `--data`: a directory of image files, or data of any known format."""
    directory = Path(config.data).expanduser()
    if directory.is_dir() and not any((directory / name).exists() for name in _SAVED_DATASET):
        files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ConfigError(f"{directory} holds no image file; point --data at images, or at a data file")
        refs = (ImageRef(path=file.relative_to(directory).as_posix()) for file in files)
        return str(directory.absolute()), refs
    source = open_source(config.data, image_root=config.image_root)
    return source.image_root, _images_of(source)


def _images_of(source: SampleSource) -> Iterator[ImageRef]:
    for index in range(len(source)):
        try:
            yield from source[index].images
        except DataError:  # a sample whose text is broken has no usable images either
            continue


def _place(out: str) -> Path:
    """Directory for the asked data: beside the cache."""
    if out == "auto":
        return Path("zarr")
    return Path() if "://" in out else Path(out).parent


def _write(lines: Iterator[dict[str, Any]], directory: Path) -> Path:
    """Write entries to `asked-<hash>.jsonl`; the same entries give the same file."""
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, partial = tempfile.mkstemp(dir=directory, prefix=".asked-", suffix=".partial")
    with os.fdopen(handle, "wb") as file:
        for entry in lines:
            line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
    target = directory / f"asked-{digest.hexdigest()[:12]}.jsonl"
    Path(partial).chmod(0o644)
    Path(partial).replace(target)
    return target
