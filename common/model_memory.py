"""How much memory a model takes, from its files alone: headers of the weights and the configuration.

weights      numbers in the safetensors headers x bytes of the dtype, shared by the devices
KV cache     positions x layers x KV heads x head width x 2 x bytes
logits       rows of one chunk x vocabulary x float32, three times (logits, their copy, their softmax)
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.checkpoint_files import read_index
from common.errors import ConfigError

GIB: Final = 2**30
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
ENGINE_BYTES: Final = GIB
"""What an engine needs besides the model: libraries and CUDA's context."""
GPU_SHARE: Final = 0.92
"""Share of a GPU's memory that vLLM takes unless `gpu_memory_utilization` is set."""
_FLOATS: Final = {"F64", "F32", "F16", "BF16"}
_STORED_BYTES: Final = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_CHUNK_ROWS: Final = 256
_LOGIT_COPIES: Final = 3
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
        return math.ceil((self.weights + self.kv) / devices) + self.logits + ENGINE_BYTES


def fitting_share(free: int, total: int) -> float:
    """Largest `gpu_memory_utilization`, in hundredths, that a GPU in use by others grants.

    vLLM refuses to start where less than that share of the whole memory is free; it looks once its own
    libraries and CUDA's context are loaded, hence the room for these.
    """
    return max(0, free - ENGINE_BYTES) * 100 // total / 100


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
    if not isinstance(text, dict):
        raise ConfigError(
            f"{directory}/config.json has a text_config that is no JSON object ({str(text)[:100]}); "
            "copy or download the model again"
        )
    item = DTYPE_BYTES[find_dtype(config) if dtype == "auto" else dtype]

    def count(name: str, default: int) -> int:
        return _count(directory, name, default if text.get(name) is None else text[name])

    layers, heads = count("num_hidden_layers", 32), count("num_attention_heads", 32)
    head = count("head_dim", max(1, count("hidden_size", 4096) // heads))
    kv = 2 * layers * count("num_key_value_heads", heads) * head * item
    rows = count("vocab_size", config.get("vocab_size") or 32_000)
    found = _weights(directory, item)
    weights = weights if found is None else found
    if weights is None:
        raise ConfigError(f"{directory} has no *.safetensors or *.bin weights; download or copy it again")
    return Need(weights, kv * positions, _CHUNK_ROWS * rows * 4 * _LOGIT_COPIES)


def _count(directory: Path, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{directory}/config.json has {name} = {str(value)[:100]}, wanted a whole number of at least 1; "
            "copy or download the model again"
        )
    return value


def _weights(directory: Path, item: int) -> int | None:
    """Bytes of the weights; None where there are none. Pickled ones count as they are stored."""
    files = _loaded(directory, "model.safetensors", "*.safetensors")
    if files:
        return sum(weight_bytes(file, item) for file in files)
    return sum(map(_size, _loaded(directory, "pytorch_model.bin", "*.bin"))) or None


def _loaded(directory: Path, whole: str, pattern: str) -> list[Path]:
    """Files that an index names, where there is one: others, such as `consolidated`, hold the same again."""
    found, index = sorted(directory.glob(pattern)), directory / f"{whole}.index.json"
    if not found or not index.exists():
        return found
    named = set(read_index(index).values())
    return [file for file in found if file.name in named] or found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error}); download or copy the model again") from error


def find_dtype(config: dict[str, Any]) -> str:
    """The dtype of the weights in a configuration; float32 when there is none."""
    text = config.get("text_config")
    both = (config, text if isinstance(text, dict) else {})
    found = next((each.get(key) for each in both for key in ("dtype", "torch_dtype") if each.get(key)), "")
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
        return sum(_numbers(tensor["shape"]) * _item(tensor["dtype"], item) for tensor in tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigError(
            f"{file} is no safetensors file ({error}); download or copy the model again"
        ) from error


def _numbers(shape: Any) -> int:
    if not all(type(each) is int and each >= 0 for each in shape):
        raise ValueError(f"a shape of {str(shape)[:100]}")
    return math.prod(shape)


def _item(stored: str, item: int) -> int:
    return item if stored in _FLOATS else _STORED_BYTES.get(stored, 1)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "config.json").read_text("utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{directory} has no config.json that can be read ({error}); check --model"
        ) from error
    raise ConfigError(f"{directory}/config.json is no JSON object; check --model")
