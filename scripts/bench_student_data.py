"""What `bench_student` measures on: a cache whose vocabulary is full size, dumped from a model that is not.

    teacher   512 wide, 4 layers ─┐ heads of 151,936 rows, the shipped tokenizer and tower; weights
    student   128 wide, 4 layers ─┘ at random: 4 × the width, as Qwen2.5 7B has over 0.5B

Times do not depend on what the weights say, so nothing is trained.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.models import TINY
from common.processor import load_processor
from scripts.plain_dump import dump_plain
from scripts.tiny_models import Size, make_model, save_model


@dataclass(frozen=True)
class Bench:
    """Sizes of the models and of the data."""

    vocabulary: int = 151_936
    """Rows of both heads, all taken as real tokens."""
    student_width: int = 128
    """D of the student."""
    teacher_width: int = 512
    """D of the teacher."""
    layers: int = 4
    """Blocks of both."""
    images: int = 12
    """Images; each has a caption sample and a sample of several questions."""
    kept: int = 64
    """Kept ids a row."""


@dataclass(frozen=True)
class Made:
    """Where the pieces lie."""

    teacher: Path
    """Model directory."""
    student: Path
    """Model directory."""
    cache: Path
    """What the teacher knows."""


def make(bench: Bench, directory: Path) -> Made:
    """Make models, data and cache.

    Args:
        bench: The sizes.
        directory: Where to; what an earlier call left there is deleted.
    """
    made = Made(directory / "teacher", directory / "student", directory / "zarr" / "l1")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _save_model(bench, bench.teacher_width, made.teacher)
    _save_model(bench, bench.student_width, made.student)
    data = write_shapes(directory / "data", num_images=bench.images, seed=11)
    dump_plain(
        str(made.teacher),
        open_source(str(data)),
        made.cache,
        topk=bench.kept,
        vocab_size=bench.vocabulary,
    )
    return made


def _save_model(bench: Bench, width: int, directory: Path) -> None:
    processor = load_processor(str(TINY / "tiny-student"))
    model = make_model(Size(width, bench.layers, 4 * width), processor.tokenizer, seed=width)
    model.resize_token_embeddings(bench.vocabulary, mean_resizing=False)
    save_model(model, processor, directory)
