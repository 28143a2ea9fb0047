"""A model whose processor or template cannot be used is refused before the engine is loaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from common.models import TINY
from teacher_dump.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(TINY / "tiny-l1", target)
    return target


def name_image_token(model: Path, token: str) -> None:
    """Have the processor mark images with another token than the tokenizer knows of."""
    for name, change in (("processor_config.json", {"image_token": token}), ("tokenizer_config.json", {})):
        settings = json.loads((model / name).read_text())
        del settings["image_token"]
        (model / name).write_text(json.dumps(settings | change))


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("fault", ["unknown image token", "template of nothing", "empty template"])
def test_a_processor_that_cannot_be_used_is_refused_at_the_start(
    fault: str, flags: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if fault == "unknown image token":
        name_image_token(model, "<picture>")
    else:
        (model / "chat_template.jinja").write_text("" if fault == "empty template" else "{{ '' }}")
    words = {
        "unknown image token": "marks images with '<picture>', which is no token of its tokenizer",
        "template of nothing": "template",
        "empty template": "has no chat template",
    }
    arguments = ["--model", str(model), "--limit", "4", "--out", str(tmp_path / "out"), *flags]
    assert main(arguments) == 2
    heard = capsys.readouterr().err.splitlines()
    assert heard[-1].startswith("teacher-dump: error: ")
    assert words[fault] in heard[-1]
    assert "vllm" not in sys.modules
