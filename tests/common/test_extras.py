"""What is imported comes from a base dependency or from an extra, and a missing one is told in one line."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.extras import EXTRAS, tell_missing_module

ROOT = Path(__file__).parents[2]
PACKAGES = ("schemas", "common", "teacher_dump", "student_train")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"PIL": "pillow", "google_crc32c": "google-crc32c", "pydantic_settings": "pydantic-settings"}
OTHERS = {"tokenizers": "transformers"}


def name_of(requirement: str) -> str:
    cut = min((requirement.find(each) for each in "[<>=!~ " if each in requirement), default=len(requirement))
    return requirement[:cut]


def imported() -> Iterator[tuple[str, str]]:
    """Third-party modules, with a file that imports each."""
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for module in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names):
                if module not in PACKAGES:
                    yield module, str(file.relative_to(ROOT))


def test_every_import_comes_from_a_base_dependency_or_a_known_extra():
    base = {name_of(each) for each in PROJECT["dependencies"]}
    strays = {
        (module, file)
        for module, file in imported()
        if module not in EXTRAS
        and DISTRIBUTIONS.get(module, module) not in base
        and OTHERS.get(module) not in EXTRAS
    }
    assert strays == set()


def test_every_base_dependency_is_imported_or_is_the_library_of_the_format():
    """zarr: a cache is read and written directly, and whoever installs this can open one with stock Zarr."""
    modules = {module for module, _ in imported()}
    unused = {
        name
        for name in map(name_of, PROJECT["dependencies"])
        if not modules & {name, *(module for module, each in DISTRIBUTIONS.items() if each == name)}
    }
    assert unused == {"zarr"}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_an_extra_brings_the_module_that_it_is_named_for(module, extra):
    assert module in {name_of(each).replace("-", "_") for each in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_a_missing_module_is_told_in_one_line_with_the_extra(module, extra):
    line = tell_missing_module(ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.inner"))
    assert line == f"this needs {module}, which is not installed; pip install 'cascache[{extra}]'"


def test_a_teacher_is_told_of_the_teachers_extras():
    line = tell_missing_module(ModuleNotFoundError(name="transformers"), teacher=True)
    assert line is not None
    assert "'cascache[teacher]'" in line
    assert "'cascache[teacher-cpu]'" in line


@pytest.mark.parametrize("name", ["common.no_such", "teacher_dump", "no_such", "", None])
def test_a_module_that_no_extra_brings_is_no_matter_of_installing(name):
    assert tell_missing_module(ModuleNotFoundError(name=name)) is None
