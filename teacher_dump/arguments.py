"""Which of vLLM's engine arguments a user may set, and how each affects a level.

Every argument is one of these:

    owned      the dump sets it itself: refused, with the equivalent flag
    refused    it would make captured values wrong or missing: refused, with the reason
    harmless   affects only speed and memory: allowed
    others     may change what is computed: allowed, recorded in the level's identity
    unknown    vLLM has no such argument: refused, with the nearest name
"""

import ast
import functools
import importlib.util
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.errors import ConfigError

_OWNED_ARGUMENTS = {
    "model": "--model",
    "revision": "--model",
    "code_revision": "--model",
    "tokenizer": "--model",
    "tokenizer_revision": "--model",
    "hf_config_path": "--model",
    "model_weights": "--model",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "max_model_len": "--max-len",
    "max_num_seqs": "--max-num-seqs",
    "tensor_parallel_size": "--tensor-parallel",
    "pipeline_parallel_size": "--pipeline-parallel",
    "data_parallel_size": "--workers",
    "seed": "--seed",
    "enable_prefix_caching": "--prefix-cache",
    "worker_extension_cls": None,
    "mm_processor_kwargs": "--max-pixels and --min-pixels",
    "logprobs_mode": None,
}
"""vLLM arguments that the dump sets itself, and the equivalent flag."""

_SKIPS = "it leaves out prompt positions, whose rows would be wrong"
_ELSEWHERE = "keys and values would come from elsewhere, and rows of those positions are never computed"
_DRAFTS = "a dump scores prompts, which drafting cannot make faster, and rows of drafted tokens are untested"
_ADAPTER = "no request asks for an adapter, and its weights are not in the fingerprint; merge it into --model"
_NO_GENERATOR = "the model would give embeddings or scores, no logits of the next token"
_EMBEDS = "the capture compares the token or the image under every row, and embeddings carry neither"
_FOREIGN = "the capture hooks vLLM's own class, and other code cannot be named in the manifest"
_ANSWERS = "the dump sets every sampling parameter itself; see --response-temperature and --max-new-tokens"
_REFUSED_ARGUMENTS = {
    "kv_sharing_fast_prefill": _SKIPS,
    "swa_bounded_replay": _SKIPS,
    "prefill_context_parallel_size": "each worker would compute only a share of the positions",
    "kv_transfer_config": _ELSEWHERE,
    "ec_transfer_config": "image states would come from elsewhere, under names that are not compared",
    "kv_offloading_size": _ELSEWHERE,
    "speculative_config": _DRAFTS,
    "spec_method": _DRAFTS,
    "spec_model": _DRAFTS,
    "spec_tokens": _DRAFTS,
    "diffusion_config": "a diffusion model has no distribution of the next token",
    "enable_lora": _ADAPTER,
    "default_mm_loras": _ADAPTER,
    "runner": _NO_GENERATOR,
    "convert": _NO_GENERATOR,
    "pooler_config": _NO_GENERATOR,
    "enable_prompt_embeds": _EMBEDS,
    "enable_mm_embeds": _EMBEDS,
    "language_model_only": "the teacher would not see images",
    "mm_encoder_only": "the engine would have no language model",
    "skip_tokenizer_init": "the teacher's own answers would not end at its end-of-turn token",
    "model_class_overrides": _FOREIGN,
    "worker_cls": _FOREIGN,
    "scheduler_cls": _FOREIGN,
    "io_processor_plugin": _FOREIGN,
    "logits_processors": "it changes the teacher's own answers, and code cannot be named in the manifest",
    "watermark_config": "it changes the teacher's own answers",
    "generation_config": _ANSWERS,
    "override_generation_config": _ANSWERS,
}
"""vLLM arguments under which captured values are wrong or missing, and why."""

_OFF = {
    "prefill_context_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "generation_config": ("auto", "vllm"),
}
"""Values, besides false and None, under which a refused argument has no effect."""

_HARMLESS_ARGUMENTS = frozenset(
    {
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enforce_eager",
        "gpu_memory_utilization",
        "hf_token",  # a secret: never in a manifest
        "kv_cache_memory_bytes",
        "limit_mm_per_prompt",
        "load_format",
        "max_logprobs",
        "max_num_batched_tokens",
        "max_parallel_loading_workers",
        "mm_processor_cache_gb",
        "served_model_name",
        "use_tqdm_on_load",
    }
)
"""vLLM arguments that change speed and memory, not what is computed (rounding aside)."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse vLLM arguments that the capture depends on or that vLLM does not have.

    Args:
        arguments: Names, with underscores, and values.

    Raises:
        ConfigError: With the first of them.
    """
    for name, value in sorted(arguments.items()):
        if name in _OWNED_ARGUMENTS:
            flag = _OWNED_ARGUMENTS[name]
            cure = f"use {flag}" if flag else "leave it out"
            raise ConfigError(f"--engine-arg {name} is set by the dump itself; {cure}")
        if name in _REFUSED_ARGUMENTS and value and value not in _OFF.get(name, ()):
            raise ConfigError(f"--engine-arg {name} is refused: {_REFUSED_ARGUMENTS[name]}; leave it out")
    _check_values(arguments)
    _check_names(arguments)


def _check_values(arguments: Mapping[str, Any]) -> None:
    if arguments.get("load_format") == "dummy":
        raise ConfigError(
            "--engine-arg load_format=dummy computes with random weights under the real ones' fingerprint; "
            "leave it out"
        )
    overrides = arguments.get("hf_overrides") or {}
    if not isinstance(overrides, dict):
        raise ConfigError(
            f"--engine-arg hf_overrides is {overrides!r}, wanted a JSON object: hf_overrides='{{…}}'"
        )
    if _holds(overrides, "head_dtype"):
        raise ConfigError(
            "--engine-arg hf_overrides sets head_dtype, which the dump sets itself; use --head-dtype"
        )


def _holds(value: Any, key: str) -> bool:
    """Whether a JSON object has `key` at any depth."""
    return isinstance(value, dict) and (key in value or any(_holds(each, key) for each in value.values()))


def _check_names(arguments: Mapping[str, Any]) -> None:
    known = known_arguments()
    unknown = sorted(arguments.keys() - known) if known else []
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        cure = f"did you mean {near[0]}?" if near else "see `vllm serve --help=all`"
        raise ConfigError(f"--engine-arg {unknown[0]}: the vLLM here has no such argument; {cure}")


@functools.cache
def known_arguments() -> frozenset[str]:
    """Names that the installed vLLM takes; empty without vLLM.

    Read from its source: importing vLLM takes seconds, and may touch the GPU before the engine's own process.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    root = Path(found.origin).parent
    fields = _class_body(root / "engine" / "arg_utils.py", "EngineArgs")
    methods = _class_body(root / "entrypoints" / "llm.py", "LLM")
    start = [each for each in methods if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    names = {
        each.target.id
        for each in fields
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return frozenset(names | {each.arg for function in start for each in function.args.kwonlyargs})


def _class_body(file: Path, name: str) -> list[ast.stmt]:
    """Statements of a top-level class; none where file or class is gone."""
    if not file.exists():
        return []
    classes = (each for each in ast.parse(file.read_text("utf-8")).body if isinstance(each, ast.ClassDef))
    return next((each.body for each in classes if each.name == name), [])


def telling_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Those vLLM arguments that may change what is computed, values as JSON: part of a level's identity."""
    return {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in sorted(arguments.items())
        if name not in _HARMLESS_ARGUMENTS and name not in _REFUSED_ARGUMENTS
    }
