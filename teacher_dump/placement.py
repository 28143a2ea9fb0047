"""Where an audit's teacher fits: bytes it takes, bytes that are free, before anything is loaded."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from common.devices import free_memory
from common.errors import ConfigError
from common.model_memory import DTYPE_BYTES

_MARGIN = 1.1
_LIVE_STATES = 32
"""Tensors as large as a sequence's states that one layer has at a time, attention and gates counted in."""


def needed_bytes(path: Path, *, dtype: str, rows: int, vocab_size: int, states: int) -> int:
    """Memory of a teacher and of one sequence through it, roughly.

    Args:
        path: Directory with its weights.
        dtype: They are loaded in; a quantised checkpoint's stay as they are.
        rows: Rows whose logits exist at a time.
        vocab_size: Real tokens.
        states: Numbers in the longest sequence's states, T × D.
    """
    files = sorted(path.glob("*.safetensors"))
    weights = sum(map(_numbers, files)) * DTYPE_BYTES[dtype]
    if _is_quantised(path):
        weights = sum(file.stat().st_size for file in files)
    working = states * _LIVE_STATES * DTYPE_BYTES[dtype] + rows * vocab_size * 32  # four float64 passes
    return int(_MARGIN * (weights + working))


def _numbers(file: Path) -> int:
    """Elements of all tensors of a file, from its header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


def _is_quantised(path: Path) -> bool:
    config = path / "config.json"
    return config.exists() and "quantization_config" in json.loads(config.read_text("utf-8"))


def choose_device(needed: int, free: Mapping[str, int], asked: str) -> str:
    """The device, or `auto` for all GPUs together: the first that holds `needed` bytes.

    Args:
        needed: From `needed_bytes`.
        free: Free bytes by device, such as `cuda:0`, and of `cpu`.
        asked: `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: There is no such device, or nothing holds it.
    """
    gpus = {name: size for name, size in free.items() if name != "cpu"}
    wanted = {"auto": {**gpus, "cpu": free["cpu"]}, "cuda": gpus}.get(asked) or (
        {asked: free[asked]} if asked in free else {}
    )
    if not wanted:
        raise ConfigError(f"--device {asked}: this machine has {', '.join(free)}; name one of them, or auto")
    alone = [name for name, size in wanted.items() if size >= needed]
    if asked in ("auto", "cuda") and alone in ([], ["cpu"]) and sum(gpus.values()) >= needed:
        return "auto"  # no GPU alone, all together
    if alone:
        return alone[0]
    listing = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in wanted.items())
    raise ConfigError(
        f"verifying takes about {needed / 1e9:.1f} GB, free: {listing}; verify where the dump ran, "
        "or in a narrower --dtype"
    )


def free_bytes() -> dict[str, int]:
    """Free memory of every GPU, by torch's name, and of the CPU.

    It initialises CUDA, which a process that starts an engine must not do; an audit starts none.
    """
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in gpus}
    return found | {"cpu": free_memory()}
