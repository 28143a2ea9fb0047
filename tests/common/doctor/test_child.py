"""A part that dies, hangs or talks nonsense becomes a failed check with a cure, never a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.doctor.check import Check
from common.doctor.child import ROOT, run_child
from common.doctor.config import DoctorConfig, to_flags
from common.doctor.examine import blocker

NAMES = ("data", "template", "images")
MODULE = "common.doctor.prompts"


def children(parent: int) -> list[int]:
    """Processes that a process has started and not waited for."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [
        int(pid) for pid in found.stdout.split() if Path(f"/proc/{pid}/exe").resolve().name.startswith("py")
    ]


def run_and(number: int, *, seconds: float, data: Path):
    """The real part, sent a signal when it says what it is doing for the first time."""
    sent: list[int] = []

    def say(_: str) -> None:
        if not sent:
            sent.extend(children(os.getpid()))
            for pid in sent:
                os.kill(pid, number)

    flags = to_flags(DoctorConfig(data=f"shapes:train=8,held_out=0,dir={data}"))
    found = list(run_child(MODULE, flags, NAMES, seconds=seconds, say=say))
    assert sent
    return found


def test_a_killed_part_fails_where_it_was_and_skips_the_rest(tmp_path):
    found = run_and(signal.SIGKILL, seconds=60, data=tmp_path)
    assert [(check.name, check.status) for check in found] == [
        ("data", "fail"), ("template", "skip"), ("images", "skip")
    ]  # fmt: skip
    assert "SIGKILL" in found[0].found
    assert "memory" in found[0].cure


def test_a_part_that_hangs_is_stopped(tmp_path):
    began = time.monotonic()
    found = run_and(signal.SIGSTOP, seconds=3, data=tmp_path)
    assert time.monotonic() - began < 30
    assert found[0].status == "fail"
    assert "no end after 3 s" in found[0].found
    assert "--time-limit" in found[0].cure
    assert children(os.getpid()) == []


def module(directory: Path, code: str) -> str:
    (directory / "a_part.py").write_text(code)
    return "a_part"


@pytest.mark.parametrize(
    ("code", "said", "cure"),
    [
        ("raise RuntimeError('CUDA error: no kernel image')", "no kernel image", "python -m a_part"),
        ("raise MemoryError('CUDA out of memory. Tried')", "out of memory", "--tensor-parallel"),
        ("import os; os.abort()", "SIGABRT", "python -m a_part"),
        ("print('{\"done\": true}')", "ended with 0", "python -m a_part"),
        ("print('not ours'); print('[1]'); print('{')", "ended with 0", "python -m a_part"),
        ("import no_such_module_here", "no_such_module_here", "python -m a_part"),
    ],
)
def test_a_part_that_breaks_gives_its_last_word(tmp_path, monkeypatch, code, said, cure):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = list(run_child(module(tmp_path, code), [], NAMES, seconds=60, say=lambda _: None))
    assert [check.status for check in found] == ["fail", "skip", "skip"]
    assert said in found[0].found
    assert cure in found[0].cure
    assert not found[0].found.startswith("Traceback")


def test_what_a_part_leaves_running_is_neither_waited_for_nor_left(tmp_path, monkeypatch):
    code = "import subprocess; subprocess.Popen(['sleep', '347.25']); print('{\"done\": true}')"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    list(run_child(module(tmp_path, code), [], NAMES, seconds=60, say=lambda _: None))
    assert time.monotonic() - began < 20
    left = subprocess.run(["pgrep", "-f", "^sleep 347.25$"], capture_output=True, text=True).stdout
    assert left == ""


def test_a_part_ends_when_the_command_is_killed(tmp_path):
    os.mkfifo(tmp_path / "0.json")  # nobody writes to it: the part waits for ever
    command = [
        sys.executable,
        "-m",
        "common.cache.cli",
        "doctor",
        "--quick",
        "--data",
        str(tmp_path / "0.json"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as run:
        assert run.stderr is not None
        next(line for line in run.stderr if "opening" in line)
        part = children(run.pid)
        assert len(part) == 1
        run.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{part[0]}").exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert not Path(f"/proc/{part[0]}").exists()


def test_every_setting_reaches_the_part():
    from common.settings import load_settings

    config = DoctorConfig(model="x", quick=True, any_vllm=True, engine_arg=("a=1", "b=2"), seed=7, topk=3)
    again = load_settings(DoctorConfig, to_flags(config), prog="x", section="none")
    assert again == config


@pytest.mark.parametrize(
    ("data", "images", "memory", "both", "teacher"),
    [
        ("pass", "pass", "pass", "", ""),
        ("fail", "pass", "pass", "", ""),
        ("fail", "skip", "pass", "data", ""),
        ("pass", "pass", "fail", "", "memory"),
    ],
)
def test_nothing_is_loaded_in_vain(data, images, memory, both, teacher):
    statuses = {"memory": memory, "data": data, "images": images}
    made = [Check(name, status, "x", cure="y") for name, status in statuses.items()]
    for names, unmade, wanted in ((("data",), "images", both), (("devices", "memory"), None, teacher)):
        found = blocker(made, names, unmade=unmade)
        assert (f"the check {wanted} failed" in found) if wanted else found == ""
