"""The engine tests' own ground: a case that fails names itself, a job that moves is not killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.teacher_dump.forked import run_cases, wait_while_it_moves


@pytest.mark.slow
def test_a_case_that_fails_spoils_no_other(tmp_path: Path):
    answer = run_cases("forked_job", tmp_path, tmp_path, ["works:1", "fails", "works:2"])
    assert [answer("works:1"), answer("works:2")] == ["1", "2"]
    with pytest.raises(AssertionError, match="case fails of forked_job failed") as caught:
        answer("fails")
    assert "the reason why" in str(caught.value)


@pytest.mark.parametrize(("moves", "ended"), [(True, True), (False, False)])
def test_a_job_is_killed_for_standing_still_and_not_for_taking_long(moves: bool, ended: bool):
    job = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({2 if moves else 60})"])
    progress = iter(range(1_000_000))
    assert wait_while_it_moves(job, lambda: next(progress) * moves, stall_seconds=0.4) is ended
