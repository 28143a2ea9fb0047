"""Ctrl-C at a step's end: the step is finished and saved, so nothing is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupt:
    """Notes the first SIGINT; the second one stops at once.

    With several processes the signal is left as it is: they could not agree on a step.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Decide whether to take the signal.

        Args:
            enabled: Whether this is the only process of the run.
        """
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        """Take the signal."""
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signal back."""
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
