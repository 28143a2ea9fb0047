"""When a process started: with its number, what tells it from a later one with the same number."""

import os
from pathlib import Path
from typing import Final

_STARTED: Final = 19
"""Place of the start time in /proc/<pid>/stat, counted after the name."""


def process_started(pid: int) -> int:
    """Ticks from the machine's start to the process's; 0 when it is gone, 1 where the time is unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        return int(stat.rpartition(")")[2].split()[_STARTED])
    except (OSError, IndexError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except OSError:
        pass
    return 1
