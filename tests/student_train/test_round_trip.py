"""A saved student is dumped as a teacher by the real vLLM; as its own student it has nothing to learn.

So the dump, the cache, the positions, the losses and the names of the saved weights agree.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cache.own_samples import OwnSamples
from common.cache.reader import CacheReader
from common.data.open import open_source
from common.images import image_bytes
from common.processor import load_processor
from student_train.model import load_student, save_student
from student_train.train import train
from tests.student_train.conftest import STUDENT

ROOT = Path(__file__).parents[2]
NAT = 0.02
"""Half a step of the default encoding (1/64 nat), and rounding."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("round-trip") / "student"
    save_student(load_student(STUDENT), load_processor(STUDENT), directory, card="# a student")
    return directory


@pytest.fixture(scope="module")
def own_cache(saved, shapes) -> Path:
    """What vLLM says about the saved student."""
    out = saved.with_name("zarr")
    command = [
        sys.executable,
        "-m",
        "teacher_dump",
        "--model",
        str(saved),
        "--data",
        str(shapes),
        "--out",
        str(out),
        "--with-images",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_a_dump_with_images_holds_every_image_once(own_cache, shapes):
    source = open_source(str(shapes))
    wanted = {s.sample_id: [image_bytes(i, source.image_root) for i in s.images] for s in source}
    with CacheReader(str(own_cache)) as cache:
        held = {s.sample_id: [i.data for i in s.images] for s in OwnSamples(cache)}
        files = [name for block in range(cache.num_blocks) for name in cache.read_images(block).files]
    assert held == wanted
    assert len(files) == len(set(files)) == len({data for images in wanted.values() for data in images})


@pytest.mark.slow
def test_a_student_that_is_the_teacher_has_nothing_to_learn(own_cache, saved, config, tmp_path):
    recipe = tmp_path / "one.toml"
    recipe.write_text(
        'base = "tiny"\n[[levels]]\n'
        'stages = [{name = "dft", steps = 1, batch_size = 48, learning_rate = 1e-12, kinds = []}]'
    )
    changes = {"cache": (str(own_cache),), "student": str(saved), "recipe": str(recipe)}
    out = train(config.model_copy(update=changes))["out"]
    line = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
    seal = CacheReader(str(own_cache)).seals[0]
    assert abs(line["raw/response_kl"]) < seal.errors["logprob_nats"]
    assert abs(line["raw/visual_kl"]) < seal.errors["logprob_nats"]
    assert line["raw/relation"] < seal.errors["factor_relation"]
    assert line["raw/ce"] > 0.1


@pytest.mark.slow
def test_another_students_terms_are_far_from_zero(own_cache, saved, config, tmp_path):
    """The counter-proof: the same cache with a slightly other student."""
    import torch

    other = load_student(str(saved))
    with torch.no_grad():
        for value in other.parameters_of("projector"):
            value.mul_(1.5)
    save_student(other, load_processor(STUDENT), tmp_path / "other", card="")
    recipe = tmp_path / "one.toml"
    recipe.write_text(
        'base = "tiny"\n[[levels]]\nstages = [{name = "dft", steps = 1, batch_size = 48, kinds = []}]'
    )
    changes = {"cache": (str(own_cache),), "student": str(tmp_path / "other"), "recipe": str(recipe)}
    out = train(config.model_copy(update=changes))["out"]
    line = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["raw/response_kl"] > NAT
    assert line["raw/visual_kl"] > NAT
