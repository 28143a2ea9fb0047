"""Driver and engine processes watch each other: neither outlives the other or waits for a dead process.

    driver ──spawned──> EngineCore ──spawned──> worker       the worker ends itself and EngineCore
    driver                          raylet ───> worker       the worker ends itself; a raylet serves others

    driver ──waits for an answer──> EngineCore              dies silently: the driver raises an error

Process ids are reused, so a process is identified by its id and start time, and held by a descriptor that
stays with it. The parent is ended only when it is one of the driver's own engine processes.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from common.processes import process_started

Answer = TypeVar("Answer")

_LAST_WORDS_SECONDS = 3.0  # a process that fails sends its error first, and vLLM raises that one


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that an engine works for."""

    pid: int
    """Its id."""
    started: int
    """Ticks from the machine's start to its own."""
    boot: str
    """The machine, since it was started."""
    engines: dict[int, int]
    """When each of its engine processes was started, by id."""


def engine_processes() -> list[BaseProcess]:
    """Engine processes of vLLM that this one has started and that still run."""
    return [each for each in multiprocessing.active_children() if each.name.startswith("EngineCore")]


def this_driver() -> Driver:
    """This process and the engine processes that it has started."""
    engines = [each.pid for each in engine_processes() if each.pid is not None]
    pid = os.getpid()
    return Driver(pid, process_started(pid), _boot(), {each: process_started(each) for each in engines})


def call_watched(action: Callable[[], Answer], processes: list[BaseProcess]) -> Answer:
    """What `action` returns; it may wait for an answer of `processes`.

    vLLM 0.32 waits forever for an engine process that was killed. So the action runs in a thread, which is
    left behind when that happens.

    Args:
        action: Waits for the processes.
        processes: None of them may end meanwhile; without any, the action runs in this thread.

    Raises:
        ChildProcessError: One of them is gone and the action has not raised for it.
    """
    if not processes:
        return action()
    done: Future[Answer] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001  raised again by `result` in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, name="cascache-call", daemon=True).start()
    while not wait([done], timeout=0.5).done:
        gone = [each for each in processes if not each.is_alive()]
        if gone and not wait([done], timeout=_LAST_WORDS_SECONDS).done:
            raise ChildProcessError(f"its process {_ended(gone[0].exitcode)}")
    return done.result()


def _ended(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "was killed, perhaps because memory ran out (see `dmesg`)"
    return f"ended with status {status}"


def end_with(driver: Driver) -> None:
    """End this process once `driver` is gone, and its parent if that is one of the driver's engine processes.

    Does nothing in the driver itself, on another machine, and where the driver cannot be seen (another
    container): there the process that started this one ends it.
    """
    if driver.pid == os.getpid() or driver.boot != _boot():
        return
    alive = _hold(driver.pid, driver.started)
    if alive is None:
        return
    parent = os.getppid()
    engine = _hold(parent, driver.engines[parent]) if parent in driver.engines else None

    def watch() -> None:
        select.select([alive], [], [])
        if engine is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(engine, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="cascache-watch", daemon=True).start()


def _hold(pid: int, started: int) -> int | None:
    """A descriptor of the process that had this id then; None when it is gone or the system has none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        held = os.pidfd_open(pid)
    except OSError:
        return None
    if process_started(pid) == started:
        return held
    os.close(held)
    return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return os.uname().nodename
