"""Every family: a student that is its own teacher has nothing to learn, on ragged images in one batch.

The teacher is computed one sample at a time by transformers, the student in padded micro-batches.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.open import open_source
from scripts.plain_dump import dump_plain
from student_train.train import train
from tests import tiny_families

SIZES = {"wide.png": (97, 30), "tall.png": (40, 150), "square.png": (56, 56), "grey.png": (64, 80)}
RECIPE = """
base = "tiny"
[[levels]]
stages = [{name = "dft", steps = 1, batch_size = 6, learning_rate = 1e-12, kinds = []}]
"""


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    """One image, several, none; one turn, several."""
    directory = tmp_path_factory.mktemp("ragged")
    generator = np.random.default_rng(5)
    for name, (width, height) in SIZES.items():
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert("L" if name == "grey.png" else "RGB").save(directory / name)
    asked = [
        ("wide", ["wide.png"], ["<image>\nwhat is in this image", "a cat on the mat"]),
        ("tall", ["tall.png"], ["describe the picture <image>", "a big dog", "what is red", "the mat"]),
        ("both", ["square.png", "grey.png"], ["<image><image>\ntwo of what", "a small blue cat sat"]),
        ("none", [], ["what is green", "the dog"]),
        ("grey", ["grey.png"], ["<image>what", "in"]),
        ("again", ["wide.png"], ["<image>\nwhat is in this image", "a dog"]),
    ]
    entries = [
        {
            "id": name,
            **({"image": images if len(images) > 1 else images[0]} if images else {}),
            "conversations": [
                {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)
            ],
        }
        for name, images, turns in asked
    ]
    (directory / "train.json").write_text(json.dumps(entries))
    return directory / "train.json"


def first_line(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family, ragged, config, tmp_path):
    recipe = tmp_path / "one.toml"
    recipe.write_text(RECIPE)
    same, other = (tiny_families.build(family, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    cache = dump_plain(str(same), open_source(str(ragged)), tmp_path / "zarr")
    terms = {}
    for student in (same, other):
        out = tmp_path / f"run-{student.parent.name}"
        changes = {"cache": (str(cache),), "student": str(student), "recipe": str(recipe), "out": str(out)}
        train(config.model_copy(update={**changes, "micro_batch": 3}))
        terms[student] = first_line(out)
    for name in ("raw/response_kl", "raw/visual_kl"):
        assert abs(terms[same][name]) < 1e-5
        assert terms[other][name] > 0.1
    assert terms[same]["raw/relation"] < 1e-4
    assert terms[other]["raw/relation"] > 1e-3
