"""The command with an engine process of its own, by every way of starting it; that process is killed.

python -m ... (CUDA forbidden)     whole
python -m teacher_dump             EngineCore is killed after a seal: one line
the console script                 the same command: resumes to the end
teacher_dump.cli in this engine    whole, in the driver's process: what all are compared with
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.cache.writer import sealed_parts
from common.record import Record, TopK
from schemas.manifest import Encoding
from tests import tiny_families
from tests.teacher_dump.dump_job import command, work_of, write_data
from tests.teacher_dump.forked import QUIET, ROOT
from tests.teacher_dump.process_job import FAMILY, workers_of

NUM_SAMPLES = 96
MODULE = [sys.executable, "-m", "teacher_dump"]
SCRIPT = [str(Path(sys.executable).with_name("teacher-dump"))]
OWN = ("--engine-process", "own")


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    status: int
    lines: list[str]
    """Of standard error, the progress bar left out."""


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: "subprocess.Popen[str]") -> Run:
    _, heard = process.communicate(timeout=300)
    lines = [line for line in re.split("[\r\n]+", heard) if line and not line.startswith("dump: ")]
    return Run(process.returncode, lines)


@pytest.fixture(scope="module")
def data(tiny_dir: Path) -> Path:
    tiny_families.build(FAMILY, tiny_dir)
    return write_data(work_of(tiny_dir) / "deaths", NUM_SAMPLES)


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, data: Path) -> Path:
    """By the driver's own process."""
    out = work_of(tiny_dir) / "deaths-whole"
    done = finish(start([*MODULE, *command(tiny_dir, data, out)]))
    assert done.status == 0, done.lines
    return out


def check_same(found: Path, wanted: Path) -> None:
    """Two complete caches, equal to the encoding's step: batches differ by rounding."""
    assert verify(str(found)).ok
    with CacheReader(str(found)) as ours, CacheReader(str(wanted)) as theirs:
        assert ours.complete
        assert list(ours.sample_ids) == list(theirs.sample_ids)
        for name in theirs.sample_ids:
            check_same_record(ours.read_record(name), theirs.read_record(name))


def check_same_record(found: Record, wanted: Record) -> None:
    assert np.array_equal(found.token_ids, wanted.token_ids)
    assert found.spans == wanted.spans
    check_same_rows(found.response, wanted.response)
    for ours, theirs in zip(found.visual, wanted.visual, strict=True):
        assert (ours.key, ours.image_sha256) == (theirs.key, theirs.image_sha256)
        if theirs.topk is not None and ours.topk is not None:
            check_same_rows(ours.topk, theirs.topk)
        assert ours.factor is not None
        assert theirs.factor is not None
        relations = [
            each.astype(np.float64) @ each.T.astype(np.float64) for each in (ours.factor, theirs.factor)
        ]
        assert np.linalg.norm(relations[0] - relations[1]) < 1e-2 * np.linalg.norm(relations[1])


def check_same_rows(found: TopK, wanted: TopK) -> None:
    assert np.array_equal(found.positions, wanted.positions)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1.1 * Encoding().logit_step)
    assert (found.token_ids == wanted.token_ids).mean() > 0.9, "ids of equal steps may change places"


@pytest.mark.slow
def test_a_killed_engine_process_is_one_line_and_the_same_command_resumes(
    tiny_dir: Path, data: Path, whole: Path
):
    out = work_of(tiny_dir) / "deaths-killed"
    arguments = [*command(tiny_dir, data, out), *OWN, "--max-engine-restarts", "0"]
    process = start([*MODULE, *arguments])
    while not sealed_parts(out):
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    core, worker = workers_of(process.pid)
    os.kill(core, signal.SIGKILL)
    died = finish(process)
    assert died.status == 2, died.lines
    assert len(died.lines) == 2, died.lines  # the plan, and what happened
    assert died.lines[1].startswith("teacher-dump: error: vLLM stopped while ")
    assert "was killed" in died.lines[1]
    assert died.lines[1].endswith("run the same command again to resume")
    assert not Path(f"/proc/{worker}").exists()
    sealed = len(sealed_parts(out))
    assert 0 < sealed < NUM_SAMPLES // 6
    resumed = finish(start([*SCRIPT, *arguments]))
    assert resumed.status == 0, resumed.lines
    assert f"{NUM_SAMPLES // 6 - sealed} of {NUM_SAMPLES // 6} parts to do" in resumed.lines[0]
    check_same(out, whole)


@pytest.mark.slow
def test_a_driver_that_may_not_touch_cuda_dumps_the_same(
    tiny_dir: Path, data: Path, whole: Path, tmp_path: Path
):
    out, log = work_of(tiny_dir) / "deaths-no-cuda", tmp_path / "touched"
    guarded = [sys.executable, "-m", "tests.teacher_dump.no_cuda", str(log)]
    done = finish(start([*guarded, *command(tiny_dir, data, out), *OWN]))
    assert log.read_text() == ""
    assert done.status == 0, done.lines
    check_same(out, whole)


def test_asking_torch_for_a_gpu_in_the_driver_is_caught(tmp_path: Path):
    code = f"""
from pathlib import Path
from tests.teacher_dump.no_cuda import Touched, forbid
import os, torch
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
assert forbid(Path({str(tmp_path / "log")!r})) > 50
cuda = torch.cuda
for ask in (cuda.is_available, cuda.init, cuda.device_count, cuda.mem_get_info, cuda.get_device_properties,
            cuda.synchronize, cuda.current_device, cuda._lazy_init, torch.accelerator.device_count):
    try:
        ask()
    except Touched:
        continue
    raise SystemExit(ask)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 9


def test_the_command_and_actors_ask_for_gpus_without_cuda():
    code = (
        "import os, sys\nfrom teacher_dump.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\nprint(os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_NVML")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "1"


SETTING = """
import os, sys
for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENABLE_V1_MULTIPROCESSING"):
    os.environ.pop(name, None)
os.environ.update(dict(each.split("=") for each in sys.argv[1:]))
from teacher_dump.start import import_vllm, set_environment
import_vllm(any_version=True)
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform
vllm.platforms._current_platform = UnspecifiedPlatform()  # no CPU; the CUDA one needs the CUDA build
set_environment(inside=False, num_workers=1)
from vllm.utils.system_utils import get_mp_context
print("method:", get_mp_context().get_start_method())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "method"), [((), "spawn"), (("VLLM_WORKER_MULTIPROC_METHOD=fork",), "fork")]
)
def test_off_the_cpu_vllm_spawns_unless_the_user_chose(chosen: tuple[str, ...], method: str, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(SETTING)
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program), *chosen], env=environment, capture_output=True, text=True, check=False
    )
    assert f"method: {method}" in done.stdout, done.stderr


def test_a_main_program_that_cannot_be_imported_is_refused_in_words(tmp_path: Path):
    code = (
        "from teacher_dump.start import check_main\nfrom common.errors import EngineError\n"
        "try:\n    check_main()\nexcept EngineError as error:\n    print(error)\nelse:\n    print('fine')\n"
    )
    file = tmp_path / "program.py"
    file.write_text(code)
    spawning = tmp_path / "spawning.py"
    spawning.write_text(
        "import multiprocessing\n" + code + "\nif __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('spawn').Process(target=print)\n    p.start()\n    p.join()\n"
    )

    def said(*command: str, given: str = "") -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split("\n")

    assert said("-c", code)[0] == "fine"
    assert said(str(file))[0] == "fine"
    assert "<stdin> is no file; save the program to a file" in said("-", given=code)[0]
    first, second, *_ = said(str(spawning))
    assert first == "fine"
    assert "under `if __name__ == '__main__':`" in second, "what the spawned process says as it imports it"
