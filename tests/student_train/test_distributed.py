"""Two processes see the same global batches, losses and (to rounding) weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from student_train.train import train

ROOT = Path(__file__).parents[2]


def flags(config) -> list[str]:
    return [
        *("--cache", config.cache[0], "--student", config.student, "--recipe", config.recipe),
        *(
            "--out",
            config.out,
            "--no-tensorboard",
            "--log-steps",
            "1",
            "--save-steps",
            "5",
            "--device",
            "cpu",
        ),
    ]


def launch(*arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    train(config)
    two = config.model_copy(update={"out": str(tmp_path / "two")})
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "student_train"]
    printed = launch(*launcher, *flags(two), "--max-steps", "7")
    assert printed.count("stopped at step 7") == 1
    train(two)  # goes on with one process
    for ours, theirs in zip(lines(two.out), lines(config.out), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["raw/ce"] == pytest.approx(theirs["raw/ce"], rel=1e-3)
    ours, theirs = (load_file(Path(each.out) / "model" / "model.safetensors") for each in (two, config))
    assert max((theirs[name] - value).abs().max().item() for name, value in ours.items()) < 2e-3
