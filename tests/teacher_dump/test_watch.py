"""Workers end with their driver, and take only its own engine process along; nobody waits for the dead."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teacher_dump.watch import call_watched, end_with, this_driver
from tests.teacher_dump.forked import ROOT


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize(
    ("kind", "parent_ends"), [("engine", True), ("stranger", False), ("reused", False), ("other", True)]
)
def test_a_killed_driver_ends_its_worker_and_its_engine_process_alone(
    kind: str, parent_ends: bool, tmp_path: Path
):
    report = tmp_path / "report"
    command = [sys.executable, "-m", "tests.teacher_dump.watch_job", kind, str(report)]
    driver = subprocess.Popen(command, cwd=ROOT)
    family: dict[str, int] = {}
    try:
        assert wait_until(report.exists)
        family = json.loads(report.read_text())
        assert family["driver"] == driver.pid
        assert all(map(runs, family.values()))
        driver.kill()
        driver.wait()
        assert wait_until(lambda: not runs(family["worker"]))
        if parent_ends:
            assert wait_until(lambda: not runs(family["parent"]))
        else:
            time.sleep(0.3)
            assert runs(family["parent"])
    finally:
        driver.kill()
        for pid in family.values():
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def test_the_driver_itself_and_drivers_elsewhere_are_not_watched():
    before = threading.active_count()
    here = this_driver()
    end_with(here)
    end_with(replace(here, pid=os.getppid(), boot="another machine"))
    end_with(replace(here, pid=os.getppid(), started=here.started + 1))  # that id is another's by now
    assert threading.active_count() == before


def test_waiting_for_a_killed_process_ends():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name="EngineCore")
    process.start()
    assert process.pid is not None
    never = threading.Event()
    threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
    with pytest.raises(ChildProcessError, match="its process was killed"):
        call_watched(never.wait, [process])
    never.set()
    process.join()


def test_what_the_action_returns_or_raises_comes_through():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name="EngineCore")
    process.start()
    assert this_driver().engines.keys() == {process.pid}
    assert call_watched(lambda: 7, [process]) == 7
    assert call_watched(lambda: threading.current_thread() is threading.main_thread(), [])
    with pytest.raises(ZeroDivisionError):
        call_watched(lambda: 1 // 0, [process])
    process.kill()
    process.join()
