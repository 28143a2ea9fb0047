"""Every command speaks on any terminal, whatever its encoding lacks."""

import os
import subprocess
import sys

import pytest

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.errors import tell_os_error
from common.models import TINY
from scripts.plain_dump import dump_plain
from tests.test_house import ROOT

STREAMS = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    place = tmp_path_factory.mktemp("console")
    data = write_shapes(place / "data", num_images=4, seed=3, questions_per_image=2)
    dump_plain(str(TINY / "tiny-l1"), open_source(str(data)), place / "l1→", part_samples=10)
    return place / "l1→"


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS, ids=lambda each: next(iter(each)))
def test_commands_print_what_the_terminal_lacks_as_escapes(cache, tmp_path, streams):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | streams
    for command in (
        ["teacher_dump.cli", "--help"],
        ["teacher_dump.cli", "--model", "tiny", "--data", "shapes:train=4,dir=d", "--dry-run", "--out", "→"],
        ["student_train", "--help"],
        ["student_train", "--cache", str(cache), "--dry-run"],
        ["common.cache.cli", "info", str(cache)],
        ["common.cache.cli", "show", str(cache), "train-000000-caption"],
        ["common.cache.cli", "info", str(cache / "→")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        heard = (done.stdout + done.stderr).decode("latin-1")
        assert "Traceback" not in heard, (command, heard)
        assert done.returncode == (2 if str(cache / "→") in command else 0), (command, heard)
        assert heard.strip()


def test_an_error_that_is_not_the_system_s_is_not_blamed_on_the_disk():
    assert tell_os_error(OSError("Could not load this library: x.so")) == "Could not load this library: x.so"
    assert "choose a place" in tell_os_error(FileNotFoundError(2, "No such file or directory", "x"))
