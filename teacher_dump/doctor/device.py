"""Where transformers would load the teacher once more, and whether there is room once the engine is gone."""

import time

import torch

from common.devices import free_memory
from common.doctor.host import size
from common.doctor.memory import model_need
from common.errors import ConfigError
from teacher_dump.teacher import Teacher

_RELEASE_SECONDS = 30.0
_OTHERS = 1.15
"""Activations of one sample on top of the weights."""


def loads_on(teacher: Teacher) -> tuple[int, int | None, str]:
    """Bytes wanted, bytes free where they would go (None: unknown), and the device's name.

    Asks CUDA, so only once no engine is to be started any more.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        need = model_need(teacher.path, dtype=teacher.dtype, positions=0).weights
    except ConfigError:
        return 0, None, device
    need = round(_OTHERS * need)
    until = time.monotonic() + _RELEASE_SECONDS
    while (free := _free(device)) < need and device == "cuda" and time.monotonic() < until:
        time.sleep(1)  # the engine's processes may still be giving theirs back
    return need, free, device


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory()


def room_for(need: int, room: int, device: str) -> str:
    """Why it is not loaded."""
    return f"transformers would need {size(need)} on one device, {device} has {size(room)} free"
