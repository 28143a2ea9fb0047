"""One small data set and one small cache of it, made once a session."""

from pathlib import Path

import pytest
import torch

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.models import TINY
from scripts.plain_dump import dump_plain
from student_train.config import TrainConfig

TEACHER = str(TINY / "tiny-l1")
STUDENT = str(TINY / "tiny-student")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bit-for-bit tests want one order of summation."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """24 images, a caption and a conversation each."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_images=24, seed=3, questions_per_image=3)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    """Other images, one question a sample."""
    directory = tmp_path_factory.mktemp("held-out")
    return write_shapes(
        directory,
        num_images=12,
        seed=500_003,
        name="held_out",
        questions_per_image=3,
        captions=False,
        one_question_a_sample=True,
    )


@pytest.fixture(scope="session")
def cache(shapes, tmp_path_factory) -> Path:
    """What tiny-l1 knows about `shapes`, in three parts and several blocks."""
    out = tmp_path_factory.mktemp("zarr") / "l1"
    return dump_plain(TEACHER, open_source(str(shapes)), out, part_samples=20, block_rows=300)


RECIPE = """
base = "tiny"
[[levels]]
stages = [
    {name = "dpt", steps = 3, batch_size = 4},
    {name = "sft", steps = 4, batch_size = 4},
    {name = "dft", steps = 5, batch_size = 4},
]
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Twelve steps: each stage, a few steps."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def config(cache, recipe, tmp_path) -> TrainConfig:
    """A run of twelve steps."""
    return TrainConfig(
        cache=(str(cache),),
        student=STUDENT,
        recipe=str(recipe),
        out=str(tmp_path / "run"),
        tensorboard=False,
        log_steps=1,
        save_steps=2,
    )
