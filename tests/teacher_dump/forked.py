"""Runs engine cases in a process of its own: `python -m tests.teacher_dump.forked MODULE MODELS OUT CASE...`.

vLLM changes its process (threads, environment, signal handlers), so tests never import it. Its
modules are imported once here, then each case, a function of MODULE with colon-separated arguments,
runs in a fork and pickles what it returns to OUT/CASE.
"""

import importlib
import os
import pickle
import subprocess
import sys
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


def run_cases(
    module: str, models: Path, out: Path, cases: list[str], *, beside: Path | None = None
) -> Callable[[str], Any]:
    """Run cases of a module (of this package, unless its whole name is given); returns what gives answers.

    `beside` is a directory that Python looks into first.
    """
    whole = module if "." in module else f"{__package__}.{module}"
    command = [sys.executable, "-m", __name__, whole, str(models), str(out), *cases]
    environment = {**os.environ, **QUIET} | ({"PYTHONPATH": str(beside)} if beside else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return lambda case: pickle.loads((out / case).read_bytes())


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
        name, *arguments = case.split(":")
        (out / case).write_bytes(pickle.dumps(getattr(module, name)(models, *arguments)))

    return sum(os.waitpid(fork(lambda case=case: run(case)), 0)[1] != 0 for case in sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
