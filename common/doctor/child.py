"""The parent's side of one part, which runs in a process of its own; its crash or timeout is a failed check.

    python -m teacher_dump.doctor … ──JSON lines──> checks, progress
                                    ──standard error──> the last line, where it broke

The parent imports neither half and uses no device. A part that is killed, crashes, or takes longer than
its limit gives a failed check, and the checks that it had not reached are skipped.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from common.doctor.check import Check, from_json

ROOT = Path(__file__).parents[2]
"""Directory that holds our packages."""

Say = Callable[[str], None]

_DRAIN_SECONDS = 2.0
_KEPT_LINES = 40


def run_child(
    module: str,
    flags: Sequence[str],
    names: Sequence[str],
    *,
    seconds: float,
    say: Say,
) -> Iterator[Check]:
    """Run `python -m module flags` and yield its checks as they come.

    Args:
        module: What is run.
        flags: Its command line.
        names: Checks that it makes, in order: each of them is yielded, made or not.
        seconds: Time after which it is killed.
        say: Takes one line of progress.
    """
    missing = list(names)
    child = _Child([sys.executable, "-P", "-m", module, *flags], seconds)
    doing, finished = "starting", False
    try:
        for line in child.lines():
            if "progress" in line:
                doing = line["progress"]
                say(doing)
            elif "check" in line:
                check = from_json(line["check"])
                if check.name in missing:
                    missing.remove(check.name)
                yield check
            finished = finished or "done" in line
    finally:
        child.close()
    if not finished or (missing and child.status == 0):
        broken = missing.pop(0) if missing else names[-1]
        yield _broken(broken, child, doing, f"python -m {module}")
    for name in missing:
        yield Check(name, "skip", "not reached: an earlier check of this part failed")


class _Child:
    """A process in a group of its own, read without waiting for what its children keep open."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._until = time.monotonic() + seconds
        self.seconds, self.expired = seconds, False
        self.errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._queue: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._streams = self._process.stdout, self._process.stderr
        takers = self._queue.put, self.errors.append
        self._readers = [self._read(*each) for each in zip(self._streams, takers, strict=True)]

    def _read(self, stream: IO[str], take: Callable[[str], Any]) -> threading.Thread:
        def run() -> None:
            with contextlib.suppress(ValueError):  # closed while being read
                for line in stream:
                    take(line.rstrip("\n"))

        reader = threading.Thread(target=run, daemon=True)
        reader.start()
        return reader

    @property
    def status(self) -> int | None:
        """Exit status; negative: the signal that ended it; None while it runs."""
        return self._process.poll()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Parsed lines until the process ends or its time is over."""
        while True:
            try:
                line = self._queue.get(timeout=0.1)
            except queue.Empty:
                if self.status is not None:
                    break
                if time.monotonic() > self._until:
                    self.expired = True
                    return
                continue
            yield from _parse(line)
        self._readers[0].join(_DRAIN_SECONDS)
        while not self._queue.empty():
            yield from _parse(self._queue.get())

    def close(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader, stream in zip(self._readers, self._streams, strict=True):
            reader.join(_DRAIN_SECONDS)
            if not reader.is_alive():  # else another process still holds the pipe
                stream.close()


def _parse(line: str) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(ValueError):  # not ours
        found = json.loads(line)
        if isinstance(found, dict):
            yield found


def _broken(name: str, child: _Child, doing: str, command: str) -> Check:
    last = next((line.strip() for line in reversed(child.errors) if line.strip()), "")
    said = f"; its last word: {last}" if last else ""
    values = {"exit_status": child.status, "last_lines": list(child.errors)[-12:]}
    if child.expired:
        return Check(
            name,
            "fail",
            f"no end after {child.seconds:g} s while {doing}{said}",
            f"an end within {child.seconds:g} s",
            "give a large model more time with --time-limit; if it hangs, run it by hand: " + command,
            values,
        )
    status = child.status
    how = f"killed by {_signal(-status)}" if status is not None and status < 0 else f"ended with {status}"
    return Check(
        name, "fail", f"{how} while {doing}{said}", "a normal end", _cure(how, last, command), values
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cure(how: str, last: str, command: str) -> str:
    if "out of memory" in last.lower() or "OutOfMemory" in last:
        return "a smaller model or --max-len, more devices (--tensor-parallel), or free the device first"
    if "SIGKILL" in how:
        return "most likely out of main memory (look into dmesg): free some, or take a smaller model"
    return f"run it by hand for the whole message, and report it with --json: {command}"
