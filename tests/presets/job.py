"""Engine cases for `forked`: the command itself on a built preset or a saved student; rows against transformers."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from teacher_dump.cli import main


def dump(models: Path, model: str, out: str, *more: str) -> tuple[int, str]:
    """Status and messages of `teacher-dump --model MODEL --topk 64` on the photos."""
    arguments = ["--model", str(models / model), "--data", str(models / "photos" / "train.json")]
    arguments += ["--out", str(models / out), "--topk", "64", "--max-num-seqs", "2", *more]
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
        status = main(arguments)
    return status, heard.getvalue()


def plan(models: Path, model: str) -> dict[str, Any]:
    """What `--dry-run` says, without an engine."""
    heard = io.StringIO()
    data = str(models / "photos" / "train.json")
    with contextlib.redirect_stdout(heard):
        assert main(["--model", str(models / model), "--data", data, "--dry-run", "--json"]) == 0
    return json.loads(heard.getvalue())
