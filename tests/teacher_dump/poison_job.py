"""Dumps by the command itself, with a vLLM plugin that kills the process which computes a certain picture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.teacher_dump.dump_job import write_data
from tests.teacher_dump.forked import QUIET, ROOT
from tests.teacher_dump.poison_plugin.cascache_poison import POISON

PLUGIN = Path(__file__).parent / "poison_plugin"
NUM_SAMPLES = 24


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """Its exit status; negative for a signal."""
    said: str
    """Standard error and output."""


def write_poisoned(directory: Path, *groups: tuple[int, ...]) -> Path:
    """The usual data, where the samples of each group share a poisonous picture of their own."""
    file = write_data(directory, NUM_SAMPLES)
    entries = json.loads(file.read_text())
    for number, group in enumerate(groups):
        name = f"poison-{number}.png"
        Image.new("RGB", (56, 56 + number), POISON).save(directory / name)
        for sample in group:
            assert "image" in entries[sample], "a sample without a picture cannot be poisoned"
            entries[sample]["image"] = name
    file.write_text(json.dumps(entries))
    return file


def environment(kind: str) -> dict[str, str]:
    """Of a command whose poison is of this kind; empty for none."""
    path = os.pathsep.join([str(ROOT), str(PLUGIN)])
    return {
        **os.environ,
        **QUIET,
        "PYTHONPATH": path,
        "CASCACHE_TEST_POISON": kind,
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def command(model: Path, data: Path, out: Path, *more: str, group: int = 1) -> list[str]:
    """The console script, with parts of 12 that are computed in groups."""
    script = Path(sys.executable).with_name("teacher-dump")
    settings = {
        "--model": model,
        "--data": data,
        "--out": out,
        "--topk": 16,
        "--part-samples": 12,
        "--max-num-seqs": group,
        "--logits": "float32",
        "--max-quarantine": 0.5,
        "--engine-arg": "max_num_batched_tokens=512",
    }
    flags = [str(each) for pair in settings.items() for each in pair]
    return [str(script), *flags, *more]


def start(arguments: list[str], kind: str, heard: Path) -> "subprocess.Popen[bytes]":
    """The command, its words going to a file, as leader of a process group of its own."""
    with heard.open("wb") as file:
        return subprocess.Popen(
            arguments,
            env=environment(kind),
            stdout=file,
            stderr=file,
            cwd=heard.parent,
            start_new_session=True,
        )


def run(arguments: list[str], kind: str, heard: Path) -> Ended:
    """The command until it ends."""
    status = start(arguments, kind, heard).wait(timeout=1200)
    return Ended(status, heard.read_text(errors="replace"))


def killed_after_a_verdict(arguments: list[str], kind: str, heard: Path) -> Ended:
    """The command, its driver killed once it has found the first sample that kills the engine."""
    driver = start(arguments, kind, heard)
    while "by itself: quarantined" not in heard.read_text(errors="replace"):
        assert driver.poll() is None, heard.read_text(errors="replace")
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    return Ended(driver.wait(timeout=60), heard.read_text(errors="replace"))
