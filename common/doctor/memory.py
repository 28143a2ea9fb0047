"""Whether a teacher fits the GPUs' memory, or main memory; `common.model_memory` counts what it needs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from common.devices import Device
from common.doctor.check import Check, Finding
from common.doctor.host import size
from common.model_memory import ENGINE_BYTES, GPU_SHARE, Need, fitting_share

_TIGHT: Final = 0.9
_PARALLEL: Final = (2, 4, 8, 16)
"""Attention heads are shared evenly by powers of two."""


def check_memory(
    name: str,
    need: Need,
    devices: Sequence[Device],
    *,
    free_ram: int,
    parallel: int,
    share: float = GPU_SHARE,
) -> Check:
    """Whether the engine fits into the GPUs, or into main memory without any.

    Args:
        name: The model's, for messages.
        need: From `model_need`.
        devices: GPUs; none: the model runs on the CPU.
        free_ram: Bytes of main memory that are free.
        parallel: `--tensor-parallel`.
        share: Share of a GPU that vLLM may take.
    """
    each = need.per_device(parallel if devices else 1)
    wanted = (
        f"{size(each)}{' per GPU' if devices else ''}: weights {size(need.weights)}, KV {size(need.kv)}, "
        f"logits {size(need.logits)}, the engine {size(ENGINE_BYTES)}"
    )
    values = asdict(need) | {"per_device_bytes": each, "free_ram_bytes": free_ram}
    if not devices:
        finding = Finding("memory", f"{size(free_ram)} of main memory free, no GPU", wanted, values)
        fits = each <= free_ram
        return finding.passes() if fits else finding.fails(f"{name} does not fit: take a smaller teacher")
    used = devices[:parallel]
    room = [device.free_bytes for device in used if device.free_bytes is not None]
    totals = [device.total_bytes for device in used if device.total_bytes]
    if len(room) < len(used) or len(totals) < len(used):
        return Check(
            "memory", "skip", "the driver does not report how much memory there is", wanted, "", values
        )
    allowed = min(int(share * total) for total in totals)
    said = f"{size(min(room))} free on the fullest of {len(used)}, vLLM takes up to {size(allowed)}"
    finding = Finding("memory", said, wanted, values | {"free_bytes": min(room), "allowed_bytes": allowed})
    usable = min(*room, allowed)
    if each > usable:
        return finding.fails(_memory_cure(need, usable))
    in_use = [(free, total) for free, total in zip(room, totals, strict=True) if free < share * total]
    if in_use:  # vLLM does not start there, however little the model needs
        return finding.fails(_share_cure(each, in_use))
    if each > _TIGHT * usable:
        return finding.warns("tight: lower --max-len, or spread it (--tensor-parallel)")
    return finding.passes()


def _share_cure(each: int, in_use: Sequence[tuple[int, int]]) -> str:
    lower = min(fitting_share(free, total) for free, total in in_use)
    enough = all(lower * total >= each for _, total in in_use)
    return (f"--engine-arg gpu_memory_utilization={lower:g}, or " if enough else "") + "free the GPU first"


def _memory_cure(need: Need, usable: int) -> str:
    enough = next((number for number in _PARALLEL if need.per_device(number) <= usable), None)
    spread = f"--tensor-parallel {enough}, " if enough else ""
    return f"{spread}a smaller --max-len, a smaller teacher, or free the GPU first"
