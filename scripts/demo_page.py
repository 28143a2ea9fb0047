"""What the demo shows at its end: a table in the terminal and one self-contained page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.cache.reader import CacheReader
from common.data import scenes
from common.html import image_uri, render_page
from common.models import resolve_model
from common.processor import load_processor
from common.record import Record

GALLERY_IMAGES = 24
TOP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Arm:
    """One training run of the demo."""

    name: str
    """What the table calls it."""
    out: Path
    """Its run directory."""
    flags: tuple[str, ...]
    """What makes it this run."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question of the gallery."""

    image: Path
    """The picture."""
    sample_id: str
    """The training sample the question opens."""
    question: str
    """What is asked."""
    truth: str
    """The right answer."""
    label: str
    """The answer in the training data; wrong for some, on purpose."""


def examples(data: Path, *, seed: int, noise: float) -> list[Example]:
    """Return the first question of the first training images.

    Args:
        data: Directory of the rendered set.
        seed: The set's seed.
        noise: Its label noise.
    """
    found = []
    for index in range(GALLERY_IMAGES):
        scene = scenes.scene_at(seed, index)
        true, labelled = (scenes.questions(scene, 6, label_noise=each)[0] for each in (0.0, noise))
        name = f"train-{index:06d}"
        image = data / "images" / "train" / f"{index:06d}.png"
        found.append(Example(image, f"{name}-qa", true.text, true.answer, labelled.answer))
    return found


def write_gallery(directory: Path, data: Path, *, seed: int, noise: float) -> Path:
    """Write the gallery's questions as LLaVA JSON, for the `eval` command."""
    entries = [
        {
            "id": each.sample_id,
            "image": str(each.image.resolve()),
            "conversations": [
                {"from": "human", "value": f"<image>\n{each.question}"},
                {"from": "gpt", "value": each.truth},
            ],
        }
        for each in examples(data, seed=seed, noise=noise)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "gallery.json"
    path.write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
    return path


def write_page(
    directory: Path,
    *,
    arms: Sequence[Arm],
    caches: Sequence[str],
    phases: Mapping[str, float],
    machine: str,
    data: Path,
    seed: int,
    noise: float,
) -> str:
    """Write `index.html` and return the same tables as text.

    Args:
        directory: Where the page goes.
        arms: The runs, the best known last.
        caches: The levels' caches.
        phases: Seconds by phase.
        machine: One line that names it.
        data: Directory of the rendered set.
        seed: Its seed.
        noise: Its label noise.
    """
    scores = [json.loads((arm.out / "eval.json").read_text("utf-8")) for arm in arms]
    accuracy = accuracy_table([arm.name for arm in arms], scores)
    left = {cache: _cache_line(cache) for cache in caches}
    rows = [
        {"name": name, "seconds": f"{seconds:,.0f}", "left": _left(name, left)}
        for name, seconds in phases.items()
    ]
    rows.append({"name": "all phases", "seconds": f"{sum(phases.values()):,.0f}", "left": ""})
    page = render_page(
        "demo.html.j2",
        title="cascache: a student trained down a cascade of cached teachers",
        summary=(
            f"Three students with the same start, the same images and the same labels, of which {noise:.0%} "
            "are wrong on purpose. The last one also learns from two teachers' caches; no teacher is in "
            "memory while it trains."
        ),
        machine=machine,
        accuracy=accuracy,
        phases=rows,
        examples=_cards(arms, caches[-1], examples(data, seed=seed, noise=noise)),
    )
    path = directory / "index.html"
    path.write_text(page, "utf-8")
    return f"\n{_as_text(accuracy, rows)}\n\npage: {path}"


def accuracy_table(names: Sequence[str], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return columns, rows and a note; the best cell of every column is marked."""
    kinds = list(scores[0]["kinds"])
    values = np.array([[each["accuracy"], *(each["kinds"][kind] for kind in kinds)] for each in scores])
    best = values == values.max(axis=0)
    rows = [
        {
            "name": name,
            "cells": [
                {"text": f"{100 * value:.1f}", "best": bool(flag)}
                for value, flag in zip(line, marks, strict=True)
            ],
        }
        for name, line, marks in zip(names, values, best, strict=True)
    ]
    spread = 100 * float(
        np.sqrt(np.mean([0.25 / count for count in scores[0]["num_kinds"].values()]) / len(kinds))
    )
    note = (
        f"Mean over {len(kinds)} question types, {scores[0]['num']} questions on unseen images, exact match "
        f"of generated answers. PT-SFT-SFT takes as many optimiser steps as the cascade. One seed; sampling "
        f"error of the mean about ±{spread:.1f} points."
    )
    return {"columns": ["mean", *kinds], "rows": rows, "note": note}


def _cache_line(cache: str) -> str:
    reader = CacheReader(cache)
    seals = reader.seals.values()
    size = sum(file.size_bytes for seal in seals for file in seal.files.values())
    rows = sum(seal.num_response_rows + seal.num_visual_rows for seal in seals)
    return f"{size / 1e6:.1f} MB, {rows:,} positions, {size / rows:.0f} bytes per position, all included"


def _left(phase: str, caches: Mapping[str, str]) -> str:
    return next((line for cache, line in caches.items() if phase.endswith(cache)), "")


def _cards(arms: Sequence[Arm], cache: str, gallery: Sequence[Example]) -> list[dict[str, Any]]:
    reader = CacheReader(cache)
    tokenizer = load_processor(resolve_model("tiny-l2").path_or_id).tokenizer
    said = {arm.name: _answers(arm.out / "gallery" / "answers.jsonl") for arm in arms}
    return [
        {
            "image": image_uri(Image.open(each.image)),
            "sample_id": each.sample_id,
            "question": each.question,
            "truth": each.truth,
            "label": each.label,
            "teacher": teacher_tokens(reader.read_record(each.sample_id), tokenizer),
            "answers": [{"name": name, "text": answers[each.sample_id]} for name, answers in said.items()],
        }
        for each in gallery
    ]


def teacher_tokens(record: Record, tokenizer: Any) -> list[dict[str, str]]:
    """Return the teacher's most likely first tokens of the first response, with probabilities."""
    start = next(span.start for span in record.spans if span.kind == "response")
    row = int(np.flatnonzero(record.response.positions == start - 1)[0])
    probabilities = np.exp(record.response.logprobs[row, :TOP_TOKENS])
    ids = record.response.token_ids[row, :TOP_TOKENS]
    return [
        {"text": tokenizer.decode([int(token)]), "percent": f"{value:.0%}", "width": f"{3 * value:.2f}"}
        for token, value in zip(ids, probabilities, strict=True)
    ]


def _answers(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {line["sample_id"]: line["answer"] for line in lines}


def _as_text(accuracy: Mapping[str, Any], phases: Sequence[Mapping[str, str]]) -> str:
    width = max(len(row["name"]) for row in [*accuracy["rows"], *phases])
    columns = accuracy["columns"]
    lines = ["accuracy, %".ljust(width) + "".join(f"{name:>10}" for name in columns)]
    for row in accuracy["rows"]:
        cells = [cell["text"] + ("*" if cell["best"] else " ") for cell in row["cells"]]
        lines.append(row["name"].ljust(width) + "".join(f"{cell:>10}" for cell in cells))
    lines += [accuracy["note"], "", "phase".ljust(width) + "   seconds"]
    lines += [f"{row['name'].ljust(width)}{row['seconds']:>10}  {row['left']}" for row in phases]
    return "\n".join(lines)
