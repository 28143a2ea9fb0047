"""A machine too small for the teacher is named before anything is loaded, with what would fit."""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest

from common.devices import free_memory, num_cores
from common.errors import CascacheError
from common.models import resolve_model
from teacher_dump.cli import main
from teacher_dump.config import DumpConfig
from teacher_dump.fit import check_machine
from teacher_dump.teacher import find_teacher
from tests.test_devices import row, write_tool

GIB = 2**30


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 8 billion weights: true headers, no bytes on disk behind them."""
    target = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(resolve_model("tiny").path_or_id, target)
    size = 8 * 10**9
    header = json.dumps({"w": {"dtype": "BF16", "shape": [8, 10**9], "data_offsets": [0, 2 * size]}}).encode()
    with (target / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * size)
    return target


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM for CUDA among the installed packages, and a folder on PATH for the driver's tool."""
    place = tmp_path / "packages" / "vllm-0.32.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "bin"


def problem(model: Path | str, **settings: object) -> str:
    """What the check says; empty when the machine will do."""
    config = DumpConfig(model=str(model), **settings)  # type: ignore[arg-type]
    teacher = find_teacher(resolve_model(str(model)), dtype=config.dtype, with_weights=True, options=config)
    try:
        check_machine(config, teacher, max_len=config.max_len)
    except CascacheError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "free_mib", "words"),
    [
        ({}, 80000, ()),
        (
            {},
            40000,
            ("is in use", "39.1 GiB of 79.6", "73.3 GiB", "--engine-arg gpu_memory_utilization=0.47"),
        ),
        ({"engine_arg": ("gpu_memory_utilization=0.47",)}, 40000, ()),
        ({}, 15000, ("14.6 GiB to use", "weights 14.9 GiB", "what would fit", "--tensor-parallel 2")),
        ({}, 15500, ("--quantization fp8",)),
        ({"quantization": "fp8", "engine_arg": ("gpu_memory_utilization=0.17",)}, 15000, ()),
        ({"dtype": "float32"}, 30000, ("weights 29.8 GiB",)),
        ({"tensor_parallel": 2, "engine_arg": ("gpu_memory_utilization=0.17",)}, 15000, ()),
        ({"tensor_parallel": 2, "workers": 2}, 80000, ("need 4 GPUs, 3 GPUs are here",)),
        ({"tensor_parallel": 4}, 80000, ("--tensor-parallel 4", "need 4 GPUs")),
        ({"pipeline_parallel": 2, "tensor_parallel": 2}, 80000, ("--pipeline-parallel 2", "need 4 GPUs")),
        ({"workers": 3}, 80000, ()),
        ({"workers": 4}, 80000, ("--workers 4", "need 4 GPUs")),
        ({"workers": 4, "ray": "auto"}, 80000, ()),  # the devices are the cluster's
        ({"engine_arg": ("gpu_memory_utilization=0.1",)}, 80000, ("8.0 GiB to use",)),
        ({"engine_arg": ("cpu_offload_gb=8", "gpu_memory_utilization=0.13")}, 12000, ()),
    ],
)
def test_gpus_too_few_or_too_small_are_named_with_what_would_fit(
    settings: dict[str, object], free_mib: int, words: tuple[str, ...], gpus: Path, large: Path
):
    write_tool(gpus, row(0, free_mib) + row(1, free_mib) + row(2, free_mib))
    said = problem(large, **{"dtype": "bfloat16"} | settings)
    assert bool(said) == bool(words), said
    assert all(word in said for word in words), said


def test_the_fullest_gpu_decides(gpus: Path, large: Path):
    write_tool(gpus, row(0) + row(1, 3000))
    assert "does not fit GPU 1" in problem(large, dtype="bfloat16", tensor_parallel=2)
    assert problem(large, dtype="bfloat16") == ""


def test_the_share_that_a_refusal_names_is_enough(gpus: Path, large: Path):
    """vLLM does not start where less than its share is free, even where the teacher would fit."""
    for free_mib in range(18500, 75000, 7001):
        write_tool(gpus, row(0, free_mib))
        said = problem(large, dtype="bfloat16")
        share = re.search(r"--engine-arg (gpu_memory_utilization=0\.\d+)", said)
        assert share is not None, said
        assert problem(large, dtype="bfloat16", engine_arg=(share[1],)) == ""


def test_unknown_memory_refuses_nothing(gpus: Path, large: Path):
    write_tool(gpus, "0, GPU-0, NVIDIA GB10, [N/A], [N/A], 580.82\n")
    assert problem(large) == ""


def test_hidden_gpus_are_not_there(gpus: Path, large: Path, monkeypatch: pytest.MonkeyPatch):
    write_tool(gpus, row(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU is here" in problem(large)


def test_main_memory_and_cores_are_asked_on_a_cpu(tmp_path: Path, large: Path):
    assert problem("tiny") == ""
    workers = free_memory() // (29 * GIB) + 1
    assert "does not fit main memory" in problem(large, dtype="float32", workers=workers)
    cores = num_cores()
    assert f"need {cores + 1} cores, {cores} are here" in problem("tiny", tensor_parallel=cores + 1)
    assert f"need {2 * cores} cores" in problem("tiny", tensor_parallel=cores, pipeline_parallel=2)


def test_the_command_refuses_before_it_loads_anything(
    gpus: Path, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tool(gpus, row(0, 4000))
    out = tmp_path / "cache"
    assert main(["--model", str(large), "--dtype", "bfloat16", "--out", str(out), "--limit", "4"]) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = [each for each in said if each.startswith("teacher-dump:")]
    assert line.startswith(f"teacher-dump: error: {large} does not fit GPU 0")
    assert not out.exists()
    assert "vllm" not in sys.modules


def test_a_plan_needs_no_gpu(gpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tool(gpus, "NVIDIA-SMI has failed\n", status=9)
    assert main(["--model", "tiny", "--out", str(tmp_path / "cache"), "--limit", "4", "--dry-run"]) == 0
    assert "plan: tiny" in capsys.readouterr().out
