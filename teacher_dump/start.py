"""How vLLM is started: its environment, the process that it computes in, where its output goes.

    same   it computes in this process: on a CPU with one worker, where a rerun gives the same bits
    own    driver ──spawn──> EngineCore ──spawn──> workers          everywhere else

A process of its own is started by spawn, never by fork: the driver has threads (torch, Arrow, tokenizers),
and a fork of a process that has touched CUDA cannot use a GPU. `VLLM_WORKER_MULTIPROC_METHOD=fork`, set by
the user, is respected on GPUs; on a CPU vLLM always spawns.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import EngineError
from teacher_dump.release import check_release

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's own choice is 92 % of the memory
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; saves the compiler's start-up
}
QUIET_LOGGERS = (
    "torch",  # warns on every CPU that Triton is missing
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",  # a cap on videos, of which there are none
    "transformers.models.qwen3_vl.video_processing_qwen3_vl",
    "transformers.tokenization_utils_base",  # vLLM starts with a prompt too long; ours are checked
)
"""Loggers whose warnings would only interrupt the progress bar."""

_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_RAISED = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Exit)\b(?:: .*\S)?)\s*$")
_DIED = re.compile(r"Worker proc (\S+) died unexpectedly \(exit code: (\S+)\)")
_KILLED = re.compile(r"Engine core initialization failed.*Failed core proc\(s\): \{(?:\}|.*: -\d+)")
"""No process is named, or one with the negative number of the signal that ended it."""
_EMPTY_WORDS = ("Engine core initialization failed", "See stack trace", "See root cause")


def import_vllm(*, any_version: bool) -> Any:
    """Import vLLM with its output reduced.

    Args:
        any_version: Take one that was not tested.

    Raises:
        EngineError: It is missing, or was neither tested nor checked by its source.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "Passing `min_pixels` and `max_pixels`", FutureWarning)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"the teacher needs vLLM, which does not import here ({error}); "
            "pip install 'cascache[teacher]' for CUDA machines, 'cascache[teacher-cpu]' elsewhere"
        ) from error
    check_release(str(vllm.__version__), any_version=any_version)
    return vllm


def vllm_errors() -> tuple[type[Exception], type[Exception]]:
    """The base class of vLLM's errors, and of those that one request caused; neither is a RuntimeError."""
    from vllm.exceptions import VLLMClientError, VLLMError

    return VLLMError, VLLMClientError


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def set_environment(*, inside: bool, num_workers: int) -> None:
    """Set what vLLM reads from the environment as it starts.

    Args:
        inside: Compute in this process.
        num_workers: Processes that compute.

    Raises:
        EngineError: A process of its own cannot be started from here.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if inside else "1"
    if not inside and (on_cpu() or os.environ.setdefault(_METHOD, "spawn") == "spawn"):
        check_main()
    if not on_cpu():
        return
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if num_workers > 1:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // num_workers)
        bound = [str(cores[rank * share % len(cores)]) for rank in range(num_workers)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(bound))


def check_main() -> None:
    """Refuse to spawn from a main program that a spawned process cannot import, or is importing.

    Raises:
        EngineError: With what to change.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineError(
            "the engine runs in a process of its own, which imports the main program, and that starts the "
            "engine again; put the lines that start it under `if __name__ == '__main__':`"
        )
    main = sys.modules["__main__"]
    place = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and place is not None and not Path(place).exists():
        raise EngineError(
            f"the engine runs in a process of its own, which imports the main program, and {place} is no "
            "file; save the program to a file, or call teacher-dump"
        )


class EngineLog:
    """What vLLM's processes print, kept in a file that only a failure leaves behind.

    With VLLM_LOGGING_LEVEL set by the user, the output stays on the terminal.
    """

    def __init__(self, *, kept: bool) -> None:
        """Open the file; `kept`: whether vLLM has processes whose output is collected."""
        self.path: Path | None = None
        if kept and os.environ.get("VLLM_LOGGING_LEVEL") == _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
            handle, name = tempfile.mkstemp(prefix=f"cascache-engine-{os.getpid()}-", suffix=".log")
            os.close(handle)
            self.path = Path(name)

    @contextlib.contextmanager
    def redirected(self) -> Iterator[None]:
        """Processes started meanwhile print to the file as long as they live; this one, meanwhile."""
        if self.path is None:
            yield
            return
        _flush()
        saved = [(number, os.dup(number)) for number in (1, 2)]
        with self.path.open("ab", buffering=0) as file:
            for number, _ in saved:
                os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            _flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)

    def explain(self, error: BaseException) -> str:
        """One line for what went wrong; where vLLM only reports that an engine process failed, its error."""
        words = " ".join(str(error).split()) or type(error).__name__
        cause = self._cause() if self.path else None
        if cause and any(each in words for each in _EMPTY_WORDS):
            words = cause
        elif self.path and _KILLED.search(words):
            words = (
                "vLLM's engine process was killed while it started and left no error of its own, most often "
                "for want of memory (see `dmesg`); free main memory, or use fewer --workers, a smaller "
                "--max-len or a smaller --model"
            )
        return words + (f"; its log is {self.path}" if self.path and self.path.stat().st_size else "")

    def _cause(self) -> str | None:
        """A worker's end, else the first error that a traceback in the log ends with."""
        assert self.path is not None
        lines = self.path.read_text("utf-8", "replace").splitlines()
        died = next(filter(None, map(_DIED.search, lines)), None)
        if died is not None:
            return f"{died.group(1)} died (status {died.group(2)}; perhaps out of memory, see `dmesg`)"
        found = (match.group(1) for match in map(_RAISED.search, lines) if match)
        return next((each for each in found if not any(word in each for word in _EMPTY_WORDS)), None)

    def discard(self) -> None:
        """Remove the file; harmless twice."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
