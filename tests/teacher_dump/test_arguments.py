"""What a user may say to vLLM beside the dump's own settings: nothing that spoils rows, nothing unknown."""

import sys

import pytest

from common.errors import ConfigError
from teacher_dump.arguments import (
    _HARMLESS_ARGUMENTS,
    _OWNED_ARGUMENTS,
    _REFUSED_ARGUMENTS,
    check_arguments,
    known_arguments,
    telling_arguments,
)
from teacher_dump.config import DumpConfig


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("kv_sharing_fast_prefill=true", "leaves out prompt positions"),
        ('speculative_config={"method": "ngram", "num_speculative_tokens": 2}', "drafting"),
        ('kv_transfer_config={"kv_connector": "x"}', "come from elsewhere"),
        ("kv_offloading_size=4", "come from elsewhere"),
        ("prefill_context_parallel_size=2", "a share of the positions"),
        ("runner=pooling", "no logits"),
        ("convert=embed", "no logits"),
        ("enable_prompt_embeds=true", "embeddings"),
        ("language_model_only=true", "would not see images"),
        ("skip-tokenizer-init=true", "end-of-turn"),
        ("enable_lora=true", "merge it into --model"),
        ('logits_processors=["a:B"]', "answers"),
        ('override_generation_config={"temperature": 1}', "--response-temperature"),
        ("load_format=dummy", "random weights"),
        ('hf_overrides={"head_dtype": "float32"}', "use --head-dtype"),
        ('hf_overrides={"text_config": {"head_dtype": "model"}}', "use --head-dtype"),
        ("hf_overrides=fast", "wanted a JSON object"),
        ("kv_sharing_fast_prefil=true", "did you mean kv_sharing_fast_prefill"),
        ("gpu_memory=0.5", "did you mean"),
        ("zzzz=1", "no such argument"),
    ],
)
def test_an_argument_that_spoils_rows_is_refused_with_its_reason(pair: str, words: str):
    with pytest.raises(ConfigError, match=words):
        check_arguments(DumpConfig(engine_arg=(pair,)).engine_arguments)


@pytest.mark.parametrize(
    "pair",
    [
        "kv_sharing_fast_prefill=false",
        "runner=generate",
        "prefill_context_parallel_size=1",
        "speculative_config=null",
        "load_format=safetensors",
        'hf_overrides={"rope_theta": 5}',
        "gpu_memory_utilization=0.5",
    ],
)
def test_the_same_argument_left_off_is_taken(pair: str):
    check_arguments(DumpConfig(engine_arg=(pair,)).engine_arguments)


def test_names_are_read_without_importing_vllm():
    """`tests/teacher_dump/test_head_dtype.py` holds them to the imported classes."""
    listed = _OWNED_ARGUMENTS.keys() | _REFUSED_ARGUMENTS.keys() | _HARMLESS_ARGUMENTS
    assert listed - known_arguments() <= {"swap_space"}, "every listed name is one that vLLM has, or had"
    assert "vllm" not in sys.modules


def test_a_secret_and_arguments_left_off_stay_out_of_the_manifest():
    assert telling_arguments({"hf_token": "secret", "runner": "generate", "max_logprobs": 3}) == {}
