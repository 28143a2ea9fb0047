"""The GPUs that an engine would get, against the builds of torch and vLLM and the number asked for."""

from dataclasses import replace

from common.devices import Device, find_devices
from common.doctor.check import Check, Finding, failure
from common.doctor.host import size
from common.errors import CascacheError
from common.tested_versions import installed, release


def look_at_devices(*, parallel: int) -> tuple[list[Device], Check]:
    """The GPUs that an engine would get, and the check of them.

    Args:
        parallel: `--tensor-parallel`.
    """
    try:
        devices = find_devices()
    except CascacheError as error:
        return [], failure("devices", str(error))
    return devices, check_devices(
        devices, parallel=parallel, torch=installed("torch"), cuda_vllm=installed("vllm")
    )


def check_devices(devices: list[Device], *, parallel: int, torch: str | None, cuda_vllm: str | None) -> Check:
    """Driver, CUDA and GPUs against the build of torch, vLLM, and the number that was asked for.

    Args:
        devices: The visible ones.
        parallel: `--tensor-parallel`.
        torch: Installed version, local part included.
        cuda_vllm: Version of the vLLM for CUDA, if that is installed.
    """
    values = {
        "devices": [
            {
                "index": each.index,
                "name": each.name,
                "total_bytes": each.total_bytes,
                "free_bytes": each.free_bytes,
                "driver": each.driver,
                "cuda": each.cuda,
            }
            for each in devices
        ],
        "torch": torch,
    }
    for_cpu = torch is not None and torch != release(torch) and "cpu" in torch
    if not devices:
        return _without_gpus(
            Finding("devices", "no GPU: everything runs on the CPU", "any", values), parallel, cuda_vllm
        )
    said = ", ".join(f"{each.name} ({_memory_of(each)})" for each in devices)
    said += f"; driver {devices[0].driver}, CUDA {devices[0].cuda or 'unknown'}"
    finding = Finding("devices", said, f"{parallel} or more, of one kind", values)
    if for_cpu:
        return finding.fails(
            f"torch {torch} is built without CUDA: install cascache[teacher] in a fresh environment"
        )
    if parallel > len(devices):
        return finding.fails(f"--tensor-parallel {len(devices)} at most, or make more GPUs visible")
    if len({each.name for each in devices}) > 1:
        return finding.warns(
            "the slowest sets the pace of --tensor-parallel: choose with CUDA_VISIBLE_DEVICES"
        )
    return finding.passes()


def _without_gpus(finding: Finding, parallel: int, cuda_vllm: str | None) -> Check:
    if cuda_vllm is not None and "cpu" not in cuda_vllm:
        return replace(finding, wanted="an NVIDIA GPU with its driver").fails(
            f"vllm {cuda_vllm} needs one. Run nvidia-smi: install the driver, start the container with "
            "--gpus all, look at CUDA_VISIBLE_DEVICES; without a GPU install cascache[teacher-cpu]"
        )
    if parallel > 1:
        return replace(finding, wanted=f"{parallel} devices").warns("leave --tensor-parallel out")
    return finding.passes()


def _memory_of(device: Device) -> str:
    if device.total_bytes is None or device.free_bytes is None:
        return "memory unknown"
    return f"{size(device.free_bytes)} free of {size(device.total_bytes)}"
