"""The house holds: imports point downwards, each heavy library has its door, help is instant."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "schemas": {"schemas"},
    "common": {"schemas", "common"},
    "teacher_dump": {"schemas", "common", "teacher_dump"},
    "student_train": {"schemas", "common", "student_train"},
    "scripts": {"schemas", "common", "teacher_dump", "student_train", "scripts"},
}
DOORS = {
    "zarr": ("common/cache/",),
    "vllm": (
        "teacher_dump/engine.py",
        "teacher_dump/start.py",
        "teacher_dump/capture.py",
        "teacher_dump/seams.py",
    ),
    "obstore": ("common/cache/",),
    "ray": ("teacher_dump/distributed.py",),
}
HEAVY = ("torch", "vllm", "transformers", "zarr", "datasets", "ray", "accelerate", "numpy.f2py", "PIL")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in MAY_IMPORT:
        if package == "scripts":
            continue
        for file in sorted((ROOT / package).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_imports_point_downwards():
    upward = [
        f"{file} imports {name}"
        for file, tree in modules()
        for name in imported(tree)
        if name.split(".")[0] in MAY_IMPORT and name.split(".")[0] not in MAY_IMPORT[file.split("/")[0]]
    ]
    assert upward == []


def test_heavy_libraries_have_one_door():
    elsewhere = [
        f"{file} imports {name}"
        for file, tree in modules()
        for name in imported(tree)
        for library, doors in DOORS.items()
        if name.split(".")[0] == library and not file.startswith(doors)
    ]
    assert elsewhere == []


def test_no_import_cycles():
    graph = {
        file.removesuffix(".py").replace("/", "."): {
            name for name in imported(tree) if name.split(".")[0] in MAY_IMPORT
        }
        for file, tree in modules()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done or module not in graph:
            return
        for name in graph[module]:
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "module", ["teacher_dump.cli", "student_train.cli", "common.cache.cli", "common.doctor.cli"]
)
def test_help_needs_no_heavy_library(module):
    code = (
        f"import sys\nfrom {module} import main\n"
        f"try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[-1] == "loaded: []"
    assert "usage:" in run.stdout
