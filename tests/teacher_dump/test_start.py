"""What a user reads when vLLM does not start: the cause, where there is one, in one line."""

from collections.abc import Iterator

import pytest

from teacher_dump.start import EngineLog

FAILED = "Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineLog]:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    found = EngineLog(kept=True)
    yield found
    found.discard()


def write(log: EngineLog, text: str) -> None:
    assert log.path is not None
    log.path.write_text(text)


@pytest.mark.parametrize("processes", ["{}", "{'EngineCore_DP0': -9}"])
@pytest.mark.parametrize("printed", ["", "INFO loading weights\n"])
def test_an_engine_killed_as_it_starts_is_said_to_be_killed(processes: str, printed: str, log: EngineLog):
    write(log, printed)
    said = log.explain(RuntimeError(FAILED + processes))
    assert "was killed while it started" in said
    assert "`dmesg`" in said
    assert "--workers" in said
    assert "root cause" not in said
    assert (str(log.path) in said) == bool(printed)


def test_a_cause_in_the_log_is_what_is_said(log: EngineLog):
    write(log, "(EngineCore pid=7) ValueError: No available memory for the cache blocks\n")
    said = log.explain(RuntimeError(FAILED + "{}"))
    assert said.startswith("ValueError: No available memory")
    assert "killed" not in said


def test_an_engine_that_ended_by_itself_was_not_killed(log: EngineLog):
    for words in (FAILED + "{'EngineCore_DP0': 1}", "CUDA error: out of memory"):
        assert log.explain(RuntimeError(words)) == words


def test_with_the_output_on_the_terminal_vllms_words_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    assert EngineLog(kept=True).explain(RuntimeError(FAILED + "{}")) == FAILED + "{}"
