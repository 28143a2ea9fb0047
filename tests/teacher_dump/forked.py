"""Runs engine cases in a process of its own: `python -m tests.teacher_dump.forked MODULE MODELS OUT CASE...`.

vLLM changes its process (threads, environment, signal handlers), so tests never import it. Its
modules are imported once here, then each case, a function of MODULE with colon-separated arguments,
runs in a fork and pickles what it returns to OUT/CASE; what it prints goes to OUT/CASE.log. A case that
fails spoils no other. There is no limit on time, only on standing still: a busy machine is slow.
"""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


STALL_SECONDS = 240
"""How long the processes of a job may take no time of the processor before they are killed."""

MARK = "CASCACHE_TEST_JOB"


def run_cases(
    module: str, models: Path, out: Path, cases: list[str], *, beside: Path | None = None
) -> Callable[[str], Any]:
    """Run cases of a module (of this package, unless its whole name is given); returns what gives answers.

    `beside` is a directory that Python looks into first. The answer of a case that failed is an
    AssertionError with the end of what it printed.
    """
    whole = module if "." in module else f"{__package__}.{module}"
    command = [sys.executable, "-m", __name__, whole, str(models), str(out), *cases]
    environment = {**os.environ, **QUIET, MARK: str(out)} | ({"PYTHONPATH": str(beside)} if beside else {})
    with (out / "job.log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stalled = not wait_while_it_moves(job, lambda: processor_seconds(f"{MARK}={out}".encode()))

    def answer(case: str) -> Any:
        found = out / case
        if found.exists():
            return pickle.loads(found.read_bytes())
        logs = [file.read_text(errors="replace")[-4000:] for file in (out / f"{case}.log", out / "job.log")]
        why = f"stood still for {STALL_SECONDS} s" if stalled else "failed"
        raise AssertionError(f"case {case} of {module} {why}:\n" + "\n".join(logs))

    return answer


def wait_while_it_moves(
    job: "subprocess.Popen[bytes]", progress: Callable[[], float], *, stall_seconds: float = STALL_SECONDS
) -> bool:
    """Wait for a job; kill it once its progress has stood still for so long. Whether it ended by itself."""
    seen, since = progress(), time.monotonic()
    while True:
        try:
            job.wait(timeout=min(1.0, stall_seconds / 4))
            return True
        except subprocess.TimeoutExpired:
            now = progress()
        if now > seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            job.kill()
            job.wait()
            return False


def processor_seconds(mark: bytes) -> float:
    """Time that all processes with this environment entry, and their ended children, have computed."""
    ticks = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def fork(action: Callable[[], int | None]) -> int:
    """Process id of a fork that runs `action` and exits with what it returns."""
    child = os.fork()
    if child == 0:
        status: int | None = 1
        try:
            status = action()
        finally:
            if status == 1:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)  # a fork must not run its parent's exit handlers
    return child


def main() -> int:
    """Run the cases named on the command line; returns how many broke."""
    import torch
    import vllm

    torch.set_num_threads(1)
    vllm.LLM  # noqa: B018  imports the engine before the forks
    module = importlib.import_module(sys.argv[1])
    models, out = Path(sys.argv[2]), Path(sys.argv[3])

    def run(case: str) -> None:
        log = os.open(out / f"{case}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        name, *arguments = case.split(":")
        (out / case).write_bytes(pickle.dumps(getattr(module, name)(models, *arguments)))

    for case in sys.argv[4:]:
        os.waitpid(fork(lambda case=case: run(case)), 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
