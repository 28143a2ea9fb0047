"""SIGKILL at any moment, then the same command: the weights are those of an uninterrupted run."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student_train.config import TrainConfig
from student_train.train import train


def run_quietly(config: TrainConfig) -> None:
    """Train in a process of its own, which may be killed."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    train(config)


def start(config: TrainConfig):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.llava.modeling_llava", "accelerate"])
    process = context.Process(target=run_quietly, args=(config,))
    process.start()
    return process


@pytest.fixture
def longer(config, tmp_path):
    recipe = tmp_path / "longer.toml"
    stages = ", ".join(f'{{name = "{name}", steps = 12, batch_size = 4}}' for name in ("dpt", "sft", "dft"))
    recipe.write_text(f'base = "tiny"\n[[levels]]\nstages = [{stages}]')
    return config.model_copy(update={"recipe": str(recipe), "save_steps": 1})


def test_killed_runs_end_as_if_they_had_not_been(longer, tmp_path):
    train(longer)
    killed = longer.model_copy(update={"out": str(tmp_path / "killed")})
    draw, kills = random.Random(5), 0
    while kills < 5:
        process = start(killed)
        wait_for_progress(process, Path(killed.out), draw.uniform(0, 0.4))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    assert kills >= 3
    train(killed)
    ours, theirs = (load_file(Path(each.out) / "model" / "model.safetensors") for each in (killed, longer))
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].equal(value) for name, value in ours.items())


def wait_for_progress(process, out: Path, further: float) -> None:
    """Wait until the run writes a new line of metrics, then a little, or until it ends."""
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        size = metrics.stat() if metrics.exists() else None
        if size is not None and size.st_mtime_ns != before and size.st_size:
            break
        time.sleep(0.01)
    process.join(further)
