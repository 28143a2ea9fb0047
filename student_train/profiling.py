"""A torch profiler trace of a few steps, for `--profile`."""

from pathlib import Path

import torch

SKIPPED = 3
"""Steps before the trace starts: the first ones are slow for other reasons."""
TRACED = 3
"""Steps in the trace."""


class Profiler:
    """Traces a few steps into a file that chrome://tracing and Perfetto open; does nothing without one."""

    def __init__(self, path: Path | None) -> None:
        """Arm the profiler.

        Args:
            path: Where the trace goes; None profiles nothing.
        """
        self._profiler: torch.profiler.profile | None = None
        if path is not None:
            self._profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            )
            self._profiler.start()

    def step(self) -> None:
        """Say that a step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stop; a trace that was complete has been written by now."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
