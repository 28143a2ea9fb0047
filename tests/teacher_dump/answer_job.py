"""Dump cases for `forked` where the teacher answers itself."""

import json
from pathlib import Path
from typing import Any

from common.data.shapes import write_shapes
from teacher_dump.cli import main
from tests.teacher_dump.dump_job import said

QUESTIONS = ("what color is the object?", "how many objects are there?", "describe the image .", "is it red?")
MAX_NEW_TOKENS = 12


def root_of(models: Path) -> Path:
    root = models.with_name("answers")
    root.mkdir(exist_ok=True)
    return root


def write_mixed(root: Path) -> Path:
    """Samples with answers, with several turns, with none, without an image, and one with no question."""
    file = write_shapes(root / "shapes", num_images=3, seed=7, questions_per_image=3)
    entries = json.loads(file.read_text())
    bare = {**entries[0], "id": "unlabelled", "conversations": entries[0]["conversations"][:1]}
    waiting = {**entries[1], "id": "waiting", "conversations": entries[1]["conversations"][:3]}
    text = {"id": "text", "conversations": [{"from": "human", "value": "is there a red object?"}]}
    silent = {**entries[0], "id": "silent", "conversations": entries[0]["conversations"][1:]}
    silent.pop("image")
    file = file.with_name("mixed.json")
    file.write_text(json.dumps([*entries, bare, waiting, text, silent]))
    return file


def command(data: Path, out: Path, *more: str) -> list[str]:
    base = ["--model", "tiny", "--data", str(data), "--out", str(out), "--topk", "16", "--max-num-seqs", "4"]
    return [*base, "--max-new-tokens", str(MAX_NEW_TOKENS), "--engine-arg", "block_size=32", *more]


def answered(models: Path) -> tuple[int, str]:
    """The teacher's own, likeliest answers to the data's questions."""
    root = root_of(models)
    flags = ("--responses", "teacher", "--max-quarantine", "0.5")
    return said(lambda: main(command(write_mixed(root), root / "answered", *flags)))


def asked(models: Path) -> dict[str, Any]:
    """New questions on a directory of images, two draws each, the same dump twice."""
    root = root_of(models)
    write_shapes(root / "photos", num_images=4, seed=11)
    (root / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    flags = ["--ask", str(root / "questions.txt"), "--asks-per-image", "3"]
    flags += ["--response-samples", "2", "--response-temperature", "1.5", "--part-samples", "8"]
    images = root / "photos" / "images" / "train"
    outs = [root / name / "l1" for name in ("once", "twice")]
    return {"runs": [said(lambda out=out: main(command(images, out, *flags))) for out in outs]}


def sampled(models: Path, mode: str) -> dict[str, Any]:
    """Ids drawn at random, alone or beside the likeliest, or as many of those as hold most of the mass."""
    root = root_of(models)
    file = write_shapes(root / "sampled", num_images=3, seed=5, questions_per_image=3)
    flags = {
        "random": ["--sampling", "random", "--sampling-draws", "40"],
        "mixed": ["--sampling", "topk+random", "--sampling-draws", "20"],
        "mass": ["--topk-mass", "0.9"],
    }[mode]
    return {"run": said(lambda: main(command(file, root / mode, *flags)))}
