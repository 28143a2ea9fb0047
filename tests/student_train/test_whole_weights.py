"""A student whose weight files are not whole is refused before any weight is read."""

import shutil
from pathlib import Path

import pytest

from common.models import TINY
from student_train.cli import main


def test_a_cut_checkpoint_is_refused_before_the_run_starts(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    student, run = tmp_path / "student", tmp_path / "run"
    shutil.copytree(TINY / "tiny-student", student)
    with (student / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert main(["--cache", str(cache), "--student", str(student), "--out", str(run)]) == 2
    assert "is not whole: it has 5,000 bytes" in capsys.readouterr().err
    assert not run.exists()
