"""The wheel in an environment with nothing but the base dependencies: what works there, and what it says."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from common.cache.writer import CacheWriter
from tests.common.cache.records import make_manifest, make_records

ROOT = Path(__file__).parent.parent
SOURCE = ("schemas", "common", "teacher_dump", "student_train", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def closure(name: str, seen: set[str]) -> Iterator[Distribution]:
    """A distribution and what it needs by itself."""
    if name in seen:
        return
    seen.add(name)
    found = distribution(name)
    yield found
    for each in map(Requirement, found.requires or []):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            yield from closure(each.name.lower().replace("_", "-"), seen)


def link_base(site: Path) -> None:
    """Put the base dependencies, and what they need, into an environment's site-packages, as links."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    seen: set[str] = set()
    for each in (each for need in needs for each in closure(Requirement(need).name, seen)):
        tops = {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}
        for top in (top for top in tops if not (site / top).exists()):
            (site / top).symlink_to(Path(str(each.locate_file(top))))


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Directory of commands of an environment that has the wheel and its base dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "source").mkdir()
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / "source" / name)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", work, work / "source")
    (wheel,) = work.glob("cascache-*.whl")
    venv.create(work / "bare", with_pip=False, symlinks=True)
    (site,) = (work / "bare" / "lib").glob("python*/site-packages")
    link_base(site)
    pip("--python", work / "bare" / "bin" / "python", "install", "--no-index", "--no-deps", wheel)
    return work / "bare" / "bin"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "l1"
    writer = CacheWriter.open(str(path), make_manifest(store="both"), block_rows=30)
    records = make_records(np.random.default_rng(0), 3, first=0)
    writer.write_part(0, records, first_sample=0, num_samples=3)
    writer.write_part(1, make_records(np.random.default_rng(1), 3, first=3), first_sample=3, num_samples=3)
    writer.finalize()
    return path


def run(bare: Path, command: str, where: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    name, *arguments = command.split()
    return subprocess.run(
        [bare / name, *arguments], cwd=where, env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_has_no_extra(bare, tmp_path):
    for module in ("torch", "transformers", "vllm", "obstore", "cryptography"):
        done = run(bare, f"python -c __import__('{module}')", tmp_path)
        assert f"No module named '{module}'" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "teacher-dump",
        "teacher-dump verify",
        "student-train",
        "student-train eval",
        "cascache",
        "cascache info",
    ],
)
def test_help_needs_no_extra(bare, tmp_path, command):
    done = run(bare, f"{command} --help", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("cascache info CACHE", "t"),
        ("cascache verify CACHE", "ok: True"),
        ("cascache ls CACHE", "2 of 2"),
        ("cascache report CACHE --out page.html", "bytes: "),
        ("teacher-dump --status --out CACHE", "2 of 2 parts, 6 of 6 samples"),
    ],
)
def test_a_cache_is_looked_at_and_verified_without_extras(bare, cache, tmp_path, command, told):
    done = run(bare, command.replace("CACHE", str(cache)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("teacher-dump --model tiny", "teacher"),
        ("teacher-dump --model tiny --dry-run", "teacher"),
        ("teacher-dump verify CACHE", "teacher"),
        ("student-train --cache CACHE", "student"),
        ("student-train --cache CACHE --dry-run", "student"),
        ("student-train eval --model tiny --data CACHE", "student"),
        ("cascache check CACHE --student tiny-student", "student"),
        ("cascache ls s3://bucket/l1", "store"),
        ("cascache ls hf://datasets/owner/name", "hub"),
        ("cascache sign CACHE --key key.pem", "trust"),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(bare, cache, tmp_path, command, extra):
    (tmp_path / "key.pem").write_text("no key")
    done = run(bare, command.replace("CACHE", str(cache)), tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert ": error: " in line
    assert f"cascache[{extra}]" in line
