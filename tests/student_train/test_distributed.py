"""Two processes see the same global batches, losses and (to rounding) weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.errors import ConfigError
from student_train.launch import check_sharding
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


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch(*arguments: str) -> str:
    done = start(*arguments)
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


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_and_may_recompute(config, tmp_path, held_out):
    looks = {"eval": str(held_out), "eval_steps": 5, "eval_limit": 11}
    train(config.model_copy(update={"max_steps": 5, **looks}))
    two = config.model_copy(update={"out": str(tmp_path / "two")})
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "student_train"]
    eyes = ("--eval", str(held_out), "--eval-steps", "5", "--eval-limit", "11")
    printed = launch(*launcher, *flags(two), "--max-steps", "5", "--gradient-checkpointing", *eyes)
    assert printed.count("stopped at step 5") == 1
    for ours, theirs in zip(lines(two.out), lines(config.out), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    shared, alone = (
        json.loads((Path(each.out) / "model-best" / "eval.json").read_text()) for each in (two, config)
    )
    assert shared["num"] == alone["num"] == 11
    assert shared["num_kinds"] == alone["num_kinds"]
    assert shared["overall"] == pytest.approx(alone["overall"], abs=1 / 11 + 1e-6)


@pytest.mark.slow
def test_a_configuration_for_gpus_is_refused_on_a_cpu(config, tmp_path):
    file = tmp_path / "fsdp.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 1\nmachine_rank: 0\nmixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n"
    )
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "-m", "student_train"]
    done = start(*launcher, *flags(config))
    assert done.returncode != 0
    assert "asks for FSDP, which accelerate runs on GPUs only" in done.stderr
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("environment", "on_cpu", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True, "on GPUs only"),
        ({"ACCELERATE_USE_FSDP": "True"}, False, "set fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "use distributed_type: FSDP with fsdp_version: 2"),
    ],
)
def test_what_would_not_be_followed_is_refused(environment, on_cpu, message):
    with pytest.raises(ConfigError, match=message):
        check_sharding(environment, on_cpu=on_cpu)


def test_what_can_be_had_passes():
    check_sharding({}, on_cpu=True)
    check_sharding({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, on_cpu=False)
