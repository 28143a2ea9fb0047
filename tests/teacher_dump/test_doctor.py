"""`cascache doctor` from end to end: the real engine, the real student, and a teacher that is another one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.data.shapes import write_shapes
from common.doctor.check import CHECKS, Check, dump_line, from_json
from common.doctor.child import run_child
from common.doctor.config import DoctorConfig, to_flags
from common.doctor.document import SCHEMA
from common.models import TINY
from teacher_dump.doctor.agreement import TOLERANCES, judge
from teacher_dump.doctor.extrapolate import judge_whole_data
from teacher_dump.doctor.speed import judge_capture_cost, judge_throughput
from teacher_dump.trial import Interval

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
EVERY = [name for names in CHECKS.values() for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data"), num_images=24, seed=3, questions_per_image=2)


def doctor(place: Path, *flags: str, **environment: str) -> tuple[int, dict]:
    """Exit status and document of the console script."""
    script = Path(sys.executable).parent / "cascache"
    command = [str(script), "doctor", "--json", *flags]
    path = os.pathsep.join(filter(None, [environment.pop("first", ""), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, **QUIET, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}


@pytest.mark.slow
def test_a_healthy_machine_passes_every_check(data, tmp_path):
    code, found = doctor(tmp_path, "--data", str(data), "--samples", "16")
    checks = {each["name"]: each for each in found["checks"]}
    assert code == 0, [each for each in found["checks"] if each["status"] == "fail"]
    assert [each["name"] for each in found["checks"]] == EVERY
    assert {each["part"] for each in found["checks"]} == set(CHECKS)
    assert found["schema"] == SCHEMA
    assert found["summary"]["fail"] == found["summary"]["skip"] == 0
    sure = (*CHECKS["prompts"], "engine", "whole-data", "agreement", "fit", "losses")
    assert {checks[name]["status"] for name in sure} == {"pass"}
    agreement = checks["agreement"]["values"]
    assert agreement["samples"] == 8
    assert max(each["max_logit_error"] for each in agreement["kinds"].values()) < 1e-4
    assert checks["whole-data"]["values"]["samples"] == 48
    assert checks["step"]["values"]["note"] == ""
    assert str(Path.home()) not in json.dumps(found) or str(Path.home()) == "/"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_vllm_the_teacher_is_skipped_and_the_student_still_checked(data, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    (first / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    code, found = doctor(tmp_path, "--data", str(data), first=str(first))
    status = {each["name"]: each["status"] for each in found["checks"]}
    assert code == 0
    assert {status[name] for name in CHECKS["teacher"]} == {"skip"}
    assert {status[name] for name in CHECKS["student"]} == {"pass"}
    said = {each["name"]: each["found"] for each in found["checks"]}
    assert "vllm not installed" in said["engine"]
    assert "made-up targets" in said["step"]


@pytest.mark.slow
def test_weights_that_change_between_capture_and_comparison_fail(data, tmp_path):
    model = shutil.copytree(TINY / "tiny-l1", tmp_path / "model")

    def say(text: str) -> None:
        if text.startswith("capturing"):  # the engine has read the weights, transformers has not
            weights = load_file(model / "model.safetensors")
            name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
            weights[name][0] += 0.2  # one row of one matrix
            save_file(weights, tmp_path / "other.safetensors", metadata={"format": "pt"})
            (tmp_path / "other.safetensors").replace(model / "model.safetensors")

    config = DoctorConfig(model=str(model), data=str(data), keep=str(tmp_path), samples=8)
    names = CHECKS["teacher"]
    checks = run_child("teacher_dump.doctor", to_flags(config), names, seconds=300, say=say)
    found = {each.name: each for each in checks}
    assert found["engine"].status == "pass"
    assert found["agreement"].status == "fail"
    assert "do not dump" in found["agreement"].cure
    kinds = found["agreement"].values["kinds"]
    assert max(each["kl_mean_nats"] for each in kinds.values()) > 10 * TOLERANCES["float32"].mean_kl


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "8b"), "did you mean"),
        (("--student", "nobody"), "unknown model 'nobody'"),
        (("--keep", "."), "is not an empty directory"),
        (("--topk", "0"), "--topk"),
    ],
)
def test_wrong_settings_end_with_2_before_anything_starts(tmp_path, flags, said):
    (tmp_path / "a file").write_text("")
    code, found = doctor(tmp_path, *flags)
    assert code == 2
    assert said in found["stderr"]
    assert "Traceback" not in found["stderr"]


def test_a_file_that_is_not_there_fails_its_check_and_the_parent_loads_no_heavy_library(tmp_path):
    code = (
        "import sys\nfrom common.cache.cli import main\n"
        "code = main(['doctor', '--quick', '--json', '--data', 'nowhere.json'])\n"
        "print(code, [name for name in ('torch', 'vllm', 'transformers', 'zarr') if name in sys.modules])"
    )
    path = os.pathsep.join([str(TINY.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **QUIET, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    *document, last = done.stdout.splitlines()
    status = {each["name"]: each["status"] for each in json.loads("\n".join(document))["checks"]}
    assert last == "1 []"
    assert [status[name] for name in CHECKS["prompts"]] == ["fail", "skip", "skip"]
    assert {status[name] for name in (*CHECKS["teacher"], *CHECKS["student"])} == {"skip"}


def summary(kl: float, logit: float) -> dict[str, dict[str, float]]:
    return {
        "response": {
            "rows": 10,
            "max_logit_error": logit,
            "max_logsumexp_error": 0.0,
            "topk_agreement": 1.0,
            "kl_mean_nats": kl,
            "kl_max_nats": kl,
        }
    }


@pytest.mark.parametrize(
    ("dtype", "kl", "logit", "factor", "status"),
    [
        ("float32", 1e-9, 1e-5, 1e-3, "pass"),
        ("float32", 1e-4, 1e-5, 1e-3, "fail"),
        ("float32", 1e-9, 0.1, 1e-3, "fail"),
        ("float32", 1e-9, 1e-5, 0.5, "fail"),
        ("bfloat16", 1e-3, 0.4, 2e-2, "pass"),
        ("bfloat16", 0.1, 0.4, 2e-2, "fail"),
        ("bfloat16", float("nan"), 0.4, 2e-2, "fail"),
    ],
)
def test_what_differs_more_than_the_dtype_rounds_fails(dtype, kl, logit, factor, status):
    found = judge(
        summary(kl, logit), factor, samples=8, dtype=dtype, device="cpu", tolerance=TOLERANCES[dtype]
    )
    assert found.status == status


@pytest.mark.parametrize(
    ("seconds", "bottleneck", "status"),
    [
        ({"driver": 1.0, "engine": 2.0, "sealing": 1.0}, "engine", "pass"),
        ({"driver": 2.1, "engine": 2.0, "sealing": 1.0}, "driver", "pass"),
        ({"driver": 4.0, "engine": 2.0, "sealing": 1.0}, "driver", "warn"),
        ({"driver": 1.0, "engine": 2.0, "sealing": 9.0}, "sealing", "warn"),
    ],
)
def test_a_station_that_the_engine_waits_for_is_named(seconds, bottleneck, status):
    found = judge_throughput(seconds, rows=1000, samples=10, per_part=0.1)
    assert (found.values["bottleneck"], found.status) == (bottleneck, status)
    assert found.values["rows_per_second"]["engine"] == 500


@pytest.mark.parametrize(("capture", "status"), [(1.3, "pass"), (3.5, "warn")])
def test_a_costly_capture_is_a_warning(capture, status):
    assert judge_capture_cost(capture, 1.0, positions=100, rows=10).status == status


@pytest.mark.parametrize(("free", "status"), [(10**9, "fail"), (10**10, "pass"), (None, "pass")])
def test_a_disk_that_cannot_hold_the_level_fails(free, status):
    num_bytes, hours = Interval(2e9, 1e9, 3e9), Interval(7200.0, 7000.0, 7400.0)
    found = judge_whole_data(1000, num_bytes, hours, hours.times(2), free)
    assert found.status == status
    assert "2.0 to 4.0 hours" in found.found


def test_a_check_survives_its_way_through_a_line():
    check = Check("engine", "warn", "“x” → ü", "y", "z", {"a": [1.5, None]}, 0.5)
    assert from_json(json.loads(dump_line(check))["check"]) == check
