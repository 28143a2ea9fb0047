"""A command in a process whose torch.cuda raises: `python -m tests.teacher_dump.no_cuda LOG ARGUMENT...`.

Every function of torch.cuda, torch.accelerator and torch._C's CUDA part raises when it is called, those
named in PASSIVE aside, which read or queue something without the driver. Libraries (one that vLLM imports
does) may ask `is_available`, which PYTORCH_NVML_BASED_CUDA_CHECK=1 has torch answer without CUDA; our own
code may not. What was called is written to LOG,
with the files that called it. Processes that the engine spawns are left alone.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

PASSIVE = {
    "is_initialized": "reads a flag",
    "_is_in_bad_fork": "reads a flag",
    "_is_compiled": "looks for a symbol",
    "_lazy_call": "queues a call until CUDA is initialised",
    "manual_seed": "queues a call until CUDA is initialised",
    "manual_seed_all": "queues a call until CUDA is initialised",
    "current_accelerator": "known since torch was built",
    "_accelerator_getAccelerator": "known since torch was built",
}


CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class Touched(Exception):
    """CUDA's driver would have been asked."""


def forbid(log: Path) -> int:
    """Replace the functions; returns how many."""
    import torch

    places = [torch.cuda, torch.accelerator, torch._C]
    forbidden = [
        (place, name)
        for place in places
        for name, value in list(vars(place).items())
        if _touches(place.__name__, name, value)
    ]
    for place, name in forbidden:
        setattr(place, name, _raising(log, f"{place.__name__}.{name}", getattr(place, name)))
    return len(forbidden)


def _touches(place: str, name: str, value: Any) -> bool:
    if name in PASSIVE or not isinstance(value, FunctionType | BuiltinFunctionType):
        return False
    if place == "torch._C":
        return name.startswith(("_cuda", "_accelerator"))
    return value.__module__.startswith(("torch.cuda", "torch.accelerator", "torch._C"))


def _raising(log: Path, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def raising(*arguments: Any, **options: Any) -> Any:
        files = [frame.filename for frame in traceback.extract_stack()[:-1]]
        ours = "site-packages" not in files[-1]
        if name == "torch.cuda.is_available" and not ours and os.environ.get(CHECK) == "1":
            return inner(*arguments, **options)
        with log.open("a") as file:
            file.write(f"{name} < {' < '.join(reversed(files))}\n")
        raise Touched(name)

    return raising


def main() -> int:
    """Forbid, then run the command; returns its status."""
    from teacher_dump.cli import main as command
    from teacher_dump.environment import prepare_environment

    prepare_environment()
    log = Path(sys.argv[1])
    log.write_text("")
    assert forbid(log) > 50, "torch.cuda has other names now"
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
