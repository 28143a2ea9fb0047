"""Whether a teacher fits the GPUs' memory, or main memory; `common.model_memory` counts what it needs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from common.devices import Device
from common.doctor.check import Check, Finding
from common.doctor.host import size
from common.model_memory import ENGINE_BYTES, GPU_SHARE, Need

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
    if len(room) < len(used):
        return Check("memory", "skip", "the driver does not report free memory", wanted, "", values)
    allowed = min(int(share * (device.total_bytes or 0)) for device in used)
    said = f"{size(min(room))} free on the fullest of {len(used)}, vLLM takes up to {size(allowed)}"
    finding = Finding("memory", said, wanted, values | {"free_bytes": min(room), "allowed_bytes": allowed})
    usable = min(*room, allowed)
    if each > usable:
        return finding.fails(_memory_cure(need, usable))
    if each > _TIGHT * usable:
        return finding.warns("tight: lower --max-len, or spread it (--tensor-parallel)")
    return finding.passes()


def _memory_cure(need: Need, usable: int) -> str:
    enough = next((number for number in _PARALLEL if need.per_device(number) <= usable), None)
    spread = f"--tensor-parallel {enough}, " if enough else ""
    return f"{spread}a smaller --max-len, a smaller teacher, or free the GPU first"
