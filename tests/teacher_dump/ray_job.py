"""Dump cases for `forked` on a real Ray cluster of this machine."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from common.cache.writer import sealed_parts
from teacher_dump.cli import main
from tests.teacher_dump.dump_job import command, said, work_of, write_data
from tests.teacher_dump.forked import fork

PARTS = ("--part-samples", "16")


def alone(models: Path) -> tuple[int, str]:
    """By one engine."""
    root = work_of(models)
    return said(lambda: main([*command(models, write_data(root / "ray-data", 96), root / "alone"), *PARTS]))


def own_process(models: Path) -> tuple[int, str]:
    """By two actors whose engines have processes of their own."""
    root = work_of(models)
    arguments = command(models, write_data(root / "ray-data", 96), root / "ray-own")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return said(lambda: main([*arguments, *PARTS, "--workers", "2", "--engine-process", "own"]))


def lost_actor(models: Path) -> dict[str, Any]:
    """By two actors, one of which is killed in the middle of a part."""
    root = work_of(models)
    out, heard = root / "lost", root / "lost.log"
    arguments = [*command(models, write_data(root / "ray-data", 96), out), *PARTS, "--workers", "2"]

    def run() -> int:
        status, said_it = said(lambda: main(arguments))
        heard.write_text(said_it)
        return status

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    driver = fork(run)
    while not sealed_parts(out):
        assert os.waitpid(driver, os.WNOHANG) == (0, 0), f"the dump ended too early: {heard.read_text()}"
        time.sleep(0.01)
    sealed = len(sealed_parts(out))
    actors = working_actors()
    os.kill(actors[0], signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
    return {"status": status, "said": heard.read_text(), "sealed": sealed, "actors": len(actors)}


def working_actors() -> list[int]:
    """Actors of this machine's Ray clusters, those at work first: Ray names their task in their title."""
    titles = {}
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            titles[int(place.parent.name)] = place.read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {
        pid: title for pid, title in titles.items() if title.startswith("ray::") and "PartActor" in title
    }
    return sorted(found, key=lambda pid: found[pid].rstrip("\0").endswith(")"))
