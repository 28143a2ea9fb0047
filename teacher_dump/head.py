"""The teacher's head before anything is loaded: which dtype it is to compute in, and whether it is quantised.

A head in bfloat16 rounds logits in [16, 32) to whole eighths, far coarser than the cache's codec. vLLM's
`head_dtype` computes its product in another dtype, for every model class, both runners, every way of
sharding and `prompt_logprobs` alike. It is read from the configuration that the head's own class was given,
which is the checkpoint's for some classes and its text configuration for others:

    hf_overrides = {"head_dtype": "float32", "text_config": {"head_dtype": "float32"}}

The worker measures what the logits really are (`teacher_dump.seams.logits_dtype`).
"""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.errors import ConfigError

_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_HEAD = re.compile(r"(?:^|\.)lm_head\.(.+)")
_EXCLUDED = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
_NEVER_HEADS = frozenset({"fp8", "bitsandbytes", "torchao"})
"""Methods that vLLM applies to a model's inner layers only."""


def head_overrides(path: str, dtype: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The `hf_overrides` of vLLM under which the head computes in `dtype`.

    Args:
        path: The model's directory.
        dtype: `float32`, `bfloat16` or `float16`.
        given: The user's own overrides, which hold no `head_dtype`.
    """
    from transformers import AutoConfig

    return _merge(_head_dtypes(AutoConfig.from_pretrained(path), dtype), given)


def _head_dtypes(config: Any, dtype: str) -> dict[str, Any]:
    """The override for a configuration and those on the way down to its text configuration."""
    found: dict[str, Any] = {"head_dtype": dtype}
    text = config.get_text_config()
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (inner is text or inner.get_text_config() is text):
            found[name] = _head_dtypes(inner, dtype)
    return found


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def check_quantised_head(path: Path, *, computes_in: str | None, relates_logits: bool) -> None:
    """Refuse what needs the plain weight of a head that the checkpoint has quantised.

    Args:
        path: The model's directory.
        computes_in: Dtype that the head is to compute in, where that is not the teacher's own.
        relates_logits: Whether relations of the logits are to be kept.

    Raises:
        ConfigError: With the flags to use instead.
    """
    found = quantised_head(path)
    cures = ["--head-dtype auto"] * (computes_in is not None) + ["--relation-of hidden"] * relates_logits
    if found and cures:
        raise ConfigError(
            f"{path} has a quantised head ({found}), whose weight cannot be read as numbers: no product in "
            f"another dtype, no relation of the logits; use {' '.join(cures)}"
        )


def quantised_head(path: Path) -> str | None:
    """The evidence that a checkpoint's head is quantised; None without any.

    The tensors decide; where there are none (a hub model before its download), `config.json`.
    """
    files = sorted(path.glob("*.safetensors"))
    return _from_tensors(files) if files else _from_config(path / "config.json")


def _from_tensors(files: Iterable[Path]) -> str | None:
    from safetensors import SafetensorError

    for file in files:
        try:
            found = _from_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{file} is no safetensors file that can be read ({error}); copy or download it again"
            ) from error
        if found is not None:
            return found
    return None


def _from_file(file: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a mapping
            match = _HEAD.search(name)
            if match is None:
                continue
            dtype = tensors.get_slice(name).get_dtype()
            if match[1] not in ("weight", "bias") or dtype not in _PLAIN:
                return f"{name} is {dtype}"
    return None


def _from_config(file: Path) -> str | None:
    try:
        config = json.loads(file.read_text("utf-8")) if file.exists() else {}
        quantisation = config.get("quantization_config") or (config.get("text_config") or {}).get(
            "quantization_config"
        )
        if not quantisation:
            return None
        method = str(quantisation.get("quant_method", "unknown"))
        return f"quantization_config of {method}" if _covers_head(method, quantisation) else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ConfigError(
            f"{file} cannot be read as a model's configuration ({str(error)[:200]}), wanted a "
            "quantization_config that is a JSON object, and names or regular expressions in its lists; "
            "copy or download the model again"
        ) from error


def _covers_head(method: str, quantisation: Mapping[str, Any]) -> bool:
    if "lm_head" in quantisation:  # GPTQ, AWQ
        return bool(quantisation["lm_head"])
    if method in _NEVER_HEADS or method in ("gptq", "awq"):
        return False
    if method == "auto-round":
        extra = (quantisation.get("extra_config") or {}).get("lm_head") or {}
        return int(extra.get("bits", 16)) < 16
    if "quantized_layers" in quantisation:
        return any(_names_head(each) for each in quantisation["quantized_layers"])
    return not any(_names_head(each) for key in _EXCLUDED for each in quantisation.get(key) or ())


def _names_head(pattern: str) -> bool:
    """Whether an entry of an exclusion list (a name, `*` wildcards, or `re:` and a regex) is the head."""
    names = ("lm_head", "language_model.lm_head", "model.language_model.lm_head")
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)
