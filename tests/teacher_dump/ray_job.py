"""Dump cases for `forked` on a real Ray cluster of this machine."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from common.cache.writer import sealed_parts
from teacher_dump.cli import main
from tests.teacher_dump.dump_job import command, said, work_of, write_data
from tests.teacher_dump.forked import MARK, fork
from tests.templates import fit

PARTS = ("--part-samples", "16")


def arguments_for(models: Path, out: str) -> list[str]:
    """Of a dump in a working directory of its own, with a chat template that only that directory has."""
    root = work_of(models)
    os.chdir(root)
    Path("hub.jinja").write_text(fit("onevision_hub", "<image>"))
    data = write_data(root / "ray-data", 96)
    return [*command(models, data, root / out), *PARTS, "--chat-template", "hub.jinja"]


def alone(models: Path) -> tuple[int, str]:
    """By one engine."""
    return said(lambda: main(arguments_for(models, "alone")))


def own_process(models: Path) -> tuple[int, str]:
    """By two actors whose engines have processes of their own."""
    arguments = [*arguments_for(models, "ray-own"), "--workers", "2", "--engine-process", "own"]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return said(lambda: main(arguments))


def lost_actor(models: Path) -> dict[str, Any]:
    """By two actors, one of which is killed in the middle of a part."""
    root = work_of(models)
    out, heard = root / "lost", root / "lost.log"
    arguments = [*arguments_for(models, "lost"), "--workers", "2"]

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
    """Actors of this test's Ray cluster, those at work first: Ray names their task in their title."""
    titles, mark = {}, f"{MARK}={os.environ[MARK]}".encode()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            # The title is written over an actor's own environment; its raylet has no title.
            raylet = (place.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if mark in Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0"):
                titles[int(place.parent.name)] = place.read_bytes().decode(errors="replace")
        except OSError:  # gone meanwhile, or not ours to read
            continue
    found = {
        pid: title for pid, title in titles.items() if title.startswith("ray::") and "PartActor" in title
    }
    return sorted(found, key=lambda pid: found[pid].rstrip("\0").endswith(")"))
