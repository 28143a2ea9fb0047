"""A family of real processes: `python -m tests.teacher_dump.watch_job KIND REPORT`.

    engine     driver ── EngineCore ── worker        the worker's parent is the driver's engine process
    stranger   driver ── stranger ── worker          as a Ray worker's parent is the raylet
    other      driver, worker                        the worker is the driver's own child
    reused     driver ── stranger ── worker          the stranger has the id of an engine process long gone

Ids are written to REPORT, worker last. The driver then waits to be killed.
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from teacher_dump.watch import Driver, end_with, this_driver


def worker(driver: dict[str, Any], report: str) -> None:
    """End with the driver; say who is there."""
    named = Driver(**driver)
    end_with(named)
    partial = Path(report + ".partial")
    partial.write_text(json.dumps({"driver": named.pid, "parent": os.getppid(), "worker": os.getpid()}))
    partial.rename(report)
    time.sleep(60)


def parent(gate: Any, report: str) -> None:
    """Wait for the driver's name, then start a worker."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=worker, args=(gate.recv(), report), daemon=False)
    child.start()
    time.sleep(60)


def main() -> None:
    """Start the family."""
    kind, report = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    if kind == "other":
        driver = this_driver()
        context.Process(target=worker, args=(asdict(driver), report)).start()
    else:
        name = "EngineCore" if kind == "engine" else "raylet"
        child = context.Process(target=parent, args=(theirs, report), name=name)
        child.start()
        driver = this_driver()
        assert (child.pid in driver.engines) == (kind == "engine")
        if kind == "reused":
            assert child.pid is not None
            driver = replace(driver, engines={child.pid: 1})
        ours.send(asdict(driver))
    time.sleep(60)


if __name__ == "__main__":
    main()
