"""The best student and the average of the weights: right, resumable, and no burden to the run itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.data.open import open_source
from common.errors import ConfigError
from student_train.evaluate import evaluate
from student_train.keep import WeightAverage
from student_train.model import load_student
from student_train.train import train
from tests.student_train.conftest import STUDENT


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(theirs[name].equal(value) for name, value in ours.items())


@pytest.fixture
def keeping(config, held_out):
    return config.model_copy(update={"eval": str(held_out), "eval_steps": 4, "eval_limit": 10, "ema": 0.5})


def test_looking_and_averaging_leave_the_run_as_it_is_and_resume(config, keeping, tmp_path, held_out):
    plain = config.model_copy(update={"out": str(tmp_path / "plain")})
    parts = keeping.model_copy(update={"out": str(tmp_path / "parts")})
    train(plain)
    whole = train(keeping)
    for stop in (3, 9):
        train(parts.model_copy(update={"max_steps": stop}))
    resumed = train(parts)
    assert same(weights(whole["model"]), weights(Path(plain.out) / "model"))
    for name in ("model", "model-best", "model-ema"):
        assert same(weights(Path(keeping.out) / name), weights(Path(parts.out) / name))
    assert whole["best"] == resumed["best"]
    assert whole["best"]["step"] in (4, 8, 12)

    lines = [json.loads(line) for line in (Path(keeping.out) / "metrics.jsonl").read_text().splitlines()]
    looks = {line["total_step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    assert list(looks) == [4, 8, 12]
    assert whole["best"]["accuracy"] == max(looks.values())
    scores, _ = evaluate(
        str(Path(keeping.out) / "model-best"), open_source(str(held_out)), limit=keeping.eval_limit
    )
    assert scores["accuracy"] == pytest.approx(whole["best"]["accuracy"])
    assert not list(Path(keeping.out).glob(".model-best*"))


def test_the_average_follows_the_weights():
    student = load_student(STUDENT)
    student.freeze_but(("projector",))
    average = WeightAverage(0.75)
    average.start(student)
    assert {student.part_of(name) for name in average.values} == {"projector"}
    name = next(iter(average.values))
    start = average.values[name].clone()
    with torch.no_grad():
        dict(student.named_parameters())[name].add_(1.0)
    average.update(student)
    assert average.values[name].allclose(start + 0.25)
    average.update(student)
    assert average.values[name].allclose(start + 0.4375)


def test_adapters_go_on_after_a_look(keeping):
    pytest.importorskip("peft")
    plain = train(keeping.model_copy(update={"lora_rank": 2, "restart": True}))
    for name in ("model", "model-best", "model-ema"):
        assert weights(Path(keeping.out) / name).keys() == weights(plain["model"]).keys()
    assert not same(weights(Path(keeping.out) / "model-ema"), weights(plain["model"]))


def test_looking_needs_questions(config):
    with pytest.raises(ConfigError, match="--eval-steps needs questions"):
        train(config.model_copy(update={"eval_steps": 4}))
