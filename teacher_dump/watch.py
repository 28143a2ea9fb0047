"""A killed driver leaves no engine behind: its workers end with it, and take its engine process along.

    driver ──spawned──> EngineCore ──spawned──> worker       the worker ends itself and EngineCore
    driver                          raylet ───> worker       the worker ends itself; a raylet serves others

A process id is reused, so a process is named by its id and when it started, and held by a descriptor that
stays with it. The parent is ended only when it is one of the driver's own engine processes.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

_STARTED = 22 - 3  # field 22 of /proc/PID/stat, counted behind the name in brackets


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


def this_driver() -> Driver:
    """This process and the engine processes that it has started."""
    engines = [each.pid for each in multiprocessing.active_children() if each.name.startswith("EngineCore")]
    pid = os.getpid()
    return Driver(pid, _started(pid), _boot(), {each: _started(each) for each in engines if each is not None})


def end_with(driver: Driver) -> None:
    """End this process once `driver` is gone, and its parent if that is one of the driver's engine processes.

    Does nothing in the driver itself, on another machine, and where the driver cannot be seen (another
    container): there whoever started this process ends it.
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
    if _started(pid) == started:
        return held
    os.close(held)
    return None


def _started(pid: int) -> int:
    """Ticks from the machine's start to the process's; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[_STARTED])


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return os.uname().nodename
