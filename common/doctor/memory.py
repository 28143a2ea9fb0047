"""Whether a teacher fits, from its files alone: headers of the weights, the configuration, the GPUs' memory.

weights      numbers in the safetensors headers x bytes of the dtype, shared by tensor-parallel devices
KV cache     positions x layers x KV heads x head width x 2 x bytes, for one step of the longest samples
logits       rows of one chunk x vocabulary x float32, three times (logits, their copy, their softmax)
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from common.devices import Device
from common.doctor.check import Check, Finding
from common.doctor.host import GIB, size
from common.errors import ConfigError

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS: Final = {"F64", "F32", "F16", "BF16"}
_STORED_BYTES: Final = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_CHUNK_ROWS: Final = 256
_LOGIT_COPIES: Final = 3
_GPU_SHARE: Final = 0.9
"""Share of a GPU's memory that vLLM takes unless `gpu_memory_utilization` is set."""
_ENGINE_BYTES: Final = 2 * GIB
"""What the engine needs beside the model: libraries, activations of one step, CUDA's own."""
_TIGHT: Final = 0.9
_PARALLEL: Final = (2, 4, 8, 16)
"""Attention heads are shared evenly by powers of two."""
_LARGEST_HEADER: Final = 2**28


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one engine, over all its devices."""

    weights: int
    """The model in its dtype."""
    kv: int
    """Keys and values of the positions that one step needs."""
    logits: int
    """One chunk of logits; every device holds it."""

    def per_device(self, devices: int) -> int:
        """Bytes per device, when the layers are spread over that many."""
        return math.ceil((self.weights + self.kv) / devices) + self.logits + _ENGINE_BYTES


def model_need(directory: Path, *, dtype: str, positions: int, weights: int | None = None) -> Need:
    """What a model needs, from its directory.

    Args:
        directory: With `config.json` and safetensors files.
        dtype: What it computes in; `auto`: the configuration's dtype.
        positions: Positions whose keys and values are held.
        weights: Bytes of the weights, where the files are not there.

    Raises:
        ConfigError: The configuration or a header cannot be read.
    """
    config = _read_config(directory)
    text = config.get("text_config") or config
    item = DTYPE_BYTES[find_dtype(config) if dtype == "auto" else dtype]
    layers, heads = int(text.get("num_hidden_layers", 32)), int(text.get("num_attention_heads", 32))
    width = int(text.get("hidden_size", 4096))
    head = int(text.get("head_dim") or width // heads)
    kv = 2 * layers * int(text.get("num_key_value_heads") or heads) * head * item
    rows = int(text.get("vocab_size") or config.get("vocab_size") or 32_000)
    found = _weights(directory, item)
    weights = weights if found is None else found
    if weights is None:
        raise ConfigError(f"{directory} has no *.safetensors or *.bin weights; download or copy it again")
    return Need(weights, kv * positions, _CHUNK_ROWS * rows * 4 * _LOGIT_COPIES)


def _weights(directory: Path, item: int) -> int | None:
    """Bytes of the weights; None where there are none."""
    files = sorted(directory.glob("*.safetensors"))
    _require_shards(directory, {file.name for file in files})
    if files:
        return sum(weight_bytes(file, item) for file in files)
    pickled = [file.stat().st_size for file in directory.glob("*.bin")]
    return sum(pickled) or None


def _require_shards(directory: Path, found: set[str]) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        wanted = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is no index of weights ({error!r}); download or copy it again") from error
    missing = sorted(wanted - found)
    if missing and found:
        raise ConfigError(
            f"{directory} lacks {len(missing)} of {len(wanted)} weight files, such as {missing[0]}; "
            "download or copy them"
        )


def find_dtype(config: dict[str, Any]) -> str:
    """The dtype of the weights in a configuration; float32 when there is none."""
    text = config.get("text_config") or {}
    found = next(
        (each.get(key) for each in (config, text) for key in ("dtype", "torch_dtype") if each.get(key)), ""
    )
    name = str(found).removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"


def weight_bytes(file: Path, item: int) -> int:
    """Bytes of a safetensors file's tensors once floats take `item` bytes each; reads its header only.

    Raises:
        ConfigError: It has no such header.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 0 < length < _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        return sum(math.prod(tensor["shape"]) * _item(tensor["dtype"], item) for tensor in tensors)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ConfigError(
            f"{file} is no safetensors file ({error}); download or copy the model again"
        ) from error


def _item(stored: str, item: int) -> int:
    return item if stored in _FLOATS else _STORED_BYTES.get(stored, 1)


def check_memory(
    name: str,
    need: Need,
    devices: Sequence[Device],
    *,
    free_ram: int,
    parallel: int,
    share: float = _GPU_SHARE,
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
        f"logits {size(need.logits)}, the engine {size(_ENGINE_BYTES)}"
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


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "config.json").read_text("utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} has no config.json that can be read ({error}); check --model"
        ) from error
    raise ConfigError(f"{directory}/config.json is no JSON object; check --model")
