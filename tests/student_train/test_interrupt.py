"""The first Ctrl-C waits for the step, the second does not."""

import signal

import pytest

from student_train.interrupt import Interrupt


def test_the_first_signal_is_noted_and_the_second_stops():
    with Interrupt(enabled=True) as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_with_several_processes_the_signal_is_left_alone():
    with Interrupt(enabled=False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
