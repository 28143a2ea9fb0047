"""Which process an unfinished file in `.writing/` belongs to: its name ends with that process.

    00012-9f31c2~4be1a0c7-3121-88231        host, process, and when that process started

What a dead process left is removed by the next one that opens the cache. A process of this host is dead
when it no longer exists; another host's cannot be checked, so its files count as abandoned after a day.
"""

import hashlib
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from common.processes import process_started

FOREIGN_SECONDS: Final = 24 * 3600
"""Age at which files of another host's process count as abandoned."""

_MARK: Final = "~"


def lease() -> str:
    """The ending of a name that this process makes."""
    return f"{_MARK}{_host()}-{os.getpid()}-{process_started(os.getpid())}"


def is_left(path: Path) -> bool:
    """Whether a file or directory was left by a process that is gone; never one whose name has no owner."""
    fields = path.name.rpartition(_MARK)[2].split("-") if _MARK in path.name else []
    if len(fields) != 3 or not fields[1].isdigit():
        return False
    host, process, started = fields
    if host == _host():
        return str(process_started(int(process))) != started
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
    return False


def _host() -> str:
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
