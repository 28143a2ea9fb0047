"""The child's side: checks as JSON lines on standard output, and nothing else there.

Whatever libraries print goes to standard error. The last line marks the end of the part:
a process that died can be distinguished from one that finished.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.doctor.check import Check, dump_line, failure
from common.doctor.config import DoctorConfig
from common.errors import CascacheError
from common.settings import load_settings

_WATCH_SECONDS = 1.0


class Reporter:
    """Writes checks as they finish; owns the process's standard output from then on."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take standard output over.

        Args:
            names: Checks that this part makes, in order: an error belongs to the first one still missing.
        """
        sys.stdout.flush()
        self._lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._missing = list(names)
        self._since = time.monotonic()

    def check(self, check: Check) -> None:
        """Report a finished check; its time runs from the one before."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        if check.name in self._missing:
            self._missing.remove(check.name)
        self._write(dump_line(replace(check, seconds=round(seconds, 3))))

    def progress(self, text: str) -> None:
        """Report what is being done."""
        self._write(json.dumps({"progress": text}))

    def fail(self, error: Exception) -> None:
        """Report an error as the failure of the check that was running."""
        if self._missing:
            self.check(failure(self._missing[0], str(error)))

    def done(self) -> None:
        """Mark the end of the part."""
        self._write(json.dumps({"done": True}))

    def _write(self, line: str) -> None:
        self._lines.write(line + "\n")
        self._lines.flush()


def run_part(
    names: Sequence[str], part: Callable[[DoctorConfig, Reporter], None], argv: Sequence[str], *, prog: str
) -> int:
    """Run one part in this process; returns the exit status: 0 when every check was made.

    Args:
        names: Checks that the part makes, in order.
        part: Makes them.
        argv: Flags as `cascache doctor` takes them.
        prog: Name shown in the help text.
    """
    try:
        config = load_settings(DoctorConfig, argv, prog=prog, section="cascache-doctor")
    except CascacheError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        return 2
    reporter = Reporter(names)
    _end_with_parent()
    try:
        part(config, reporter)
    except CascacheError as error:
        reporter.fail(error)
        reporter.done()
        return 1
    reporter.done()
    return 0


def _end_with_parent() -> None:
    """If this process leads its own process group, kill the group once the parent is gone."""
    parent = os.getppid()
    if os.getpgrp() != os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
