"""What the capture expects to find in vLLM's source, as data.

    Member   a class or module has a name; a function takes these parameters first
    Call     a function calls a name, with these arguments, under no condition
    Text     a file has a string: a setting of the environment, a lazy attribute
    Absent   a class does not have a name: how the two runners are distinguished

`scripts/check_vllm_source.py` checks a release against it; a test checks it against teacher_dump, so that
every name of vLLM's that is used there is here.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """`where` defines `name`."""

    where: str
    """`file.py` or `file.py:Class`, below `vllm/`."""
    name: str
    """Attribute, method, field or parameter."""
    why: str
    """What the capture does with it."""
    takes: tuple[str, ...] = ()
    """First positional parameters, by name, after `self`."""
    keywords: tuple[str, ...] = ()
    """Parameters that are given by name."""


@dataclass(frozen=True, slots=True)
class Call:
    """`where` calls `name`."""

    where: str
    """`file.py:Class.method`."""
    name: str
    """Last part of what is called."""
    why: str
    """What the capture takes from being called there."""
    takes: tuple[str, ...]
    """First arguments as they are written; `…` matches any."""


@dataclass(frozen=True, slots=True)
class Text:
    """`where` has the string `name`."""

    where: str
    """File."""
    name: str
    """The string."""
    why: str
    """What it sets."""


@dataclass(frozen=True, slots=True)
class Absent:
    """`where` does not define `name`."""

    where: str
    """`file.py:Class`."""
    name: str
    """Attribute or method."""
    why: str
    """What its absence means."""


Expected = Member | Call | Text | Absent

_V1 = "v1/worker/gpu_model_runner.py:GPUModelRunner"
_V2 = "v1/worker/gpu/model_runner.py:GPUModelRunner"
_BATCH = "v1/worker/gpu/input_batch.py:InputBatch"
_LOGPROBS = "v1/worker/gpu/sample/prompt_logprob.py:PromptLogprobsWorker"
_STEP = "v1/core/sched/output.py:SchedulerOutput"
_NEW = "v1/core/sched/output.py:NewRequestData"
_FEATURE = "multimodal/inputs.py:MultiModalFeatureSpec"
_PLACE = "multimodal/inputs.py:PlaceholderRange"
_GROUP = "distributed/parallel_state.py:GroupCoordinator"
_HEAD = "model_executor/layers/vocab_parallel_embedding.py:ParallelLMHead"
_SHARD = "model_executor/layers/vocab_parallel_embedding.py:VocabParallelEmbeddingShardIndices"
_MODELS = "model_executor/models/"
_LLM = "entrypoints/llm.py:LLM"


def _members(where: str, why: str, names: str) -> list[Expected]:
    return [Member(where, name, why) for name in names.split()]


_RUNNERS: list[Expected] = [
    Member("v1/worker/gpu_worker.py:Worker", "model_runner", "what is hooked"),
    Call(
        "v1/worker/gpu_worker.py:Worker.execute_model",
        "execute_model",
        "every step's scheduler output is learnt before it runs",
        ("scheduler_output",),
    ),
    Member(_V1, "execute_model", "every step's scheduler output", takes=("scheduler_output",)),
    Member(_V2, "execute_model", "every step's scheduler output", takes=("scheduler_output",)),
    *_members(_V1, "head and states", "model model_config device max_num_tokens intermediate_tensors"),
    *_members(_V2, "head and states", "model model_config"),
    Member("config/model.py:ModelConfig", "dtype", "what the level is computed in"),
]

_V1_SEAM: list[Expected] = [
    Member(
        _V1,
        "_get_prompt_logprobs_dict",
        "hidden states of a step",
        takes=("hidden_states", "num_scheduled_tokens"),
    ),
    Call(
        f"{_V1}._bookkeeping_sync",
        "_get_prompt_logprobs_dict",
        "called in every step with the states of all scheduled tokens",
        ("hidden_states[:num_scheduled_tokens]", "scheduler_output.num_scheduled_tokens"),
    ),
    Member(
        _V1,
        "_bookkeeping_sync",
        "where the states come from",
        takes=("scheduler_output", "sampler_output", "logits", "hidden_states", "num_scheduled_tokens"),
    ),
    Call(
        f"{_V1}.sample_tokens",
        "_bookkeeping_sync",
        "called in every step of the last stage",
        (
            "scheduler_output",
            "sampler_output",
            "logits",
            "hidden_states",
            "scheduler_output.total_num_scheduled_tokens",
        ),
    ),
    *_members(_V1, "who owns which rows", "query_start_loc requests input_batch input_ids"),
    *_members("v1/utils.py:CpuGpuBuffer", "both sides of a buffer", "np gpu"),
    Member("v1/worker/gpu_input_batch.py:InputBatch", "req_ids", "order of the requests"),
    Member("v1/worker/gpu_input_batch.py:CachedRequestState", "num_computed_tokens", "position of a row"),
]

_V2_SEAM: list[Expected] = [
    Absent(_V2, "_get_prompt_logprobs_dict", "it marks V1"),
    Member(_V2, "prompt_logprobs_worker", "where the hook is"),
    Member(
        _LOGPROBS,
        "compute_prompt_logprobs",
        "hidden states of a step",
        takes=("logits_fn", "hidden_states", "input_batch"),
    ),
    Call(
        f"{_V2}.sample_tokens",
        "compute_prompt_logprobs",
        "called in every step of the last stage with the states of all scheduled tokens",
        ("self.model.compute_logits", "hidden_states", "input_batch"),
    ),
    *_members(
        _BATCH,
        "who owns which rows",
        "req_ids query_start_loc_np num_computed_prefill_tokens_np num_scheduled_tokens input_ids",
    ),
]

_REQUESTS: list[Expected] = [
    *_members(_STEP, "requests that come and go", "finished_req_ids scheduled_new_reqs"),
    *_members(_NEW, "what a request asks for", "req_id prompt_token_ids mm_features sampling_params"),
    *_members(_FEATURE, "which image is where", "identifier mm_position"),
    *_members(_PLACE, "which image is where", "offset length is_embed"),
]

_WORKERS: list[Expected] = [
    *[
        Member("distributed/__init__.py", name, "which rank writes")
        for name in ("get_pp_group", "get_tp_group")
    ],
    *_members(_GROUP, "which rank writes", "is_first_rank is_last_rank rank_in_group"),
    Member(_GROUP, "all_reduce", "Gram matrix of a sharded head", takes=("input_",)),
]

_LANGUAGE = {
    "qwen2.py:Qwen2ForCausalLM": "LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, InternVL",
    "qwen3.py:Qwen3ForCausalLM": "Qwen3-VL, InternVL",
    "llama.py:LlamaForCausalLM": "LLaVA",
    "gemma3.py:Gemma3ForCausalLM": "Gemma 3",
}
_VISION = (
    "llava.py:LlavaForConditionalGeneration",
    "llava_onevision.py:LlavaOnevisionForConditionalGeneration",
    "qwen2_vl.py:Qwen2VLForConditionalGeneration",
    "qwen2_5_vl.py:Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl.py:Qwen3VLForConditionalGeneration",
    "internvl.py:InternVLChatModel",
    "gemma3_mm.py:Gemma3ForConditionalGeneration",
)

_HEADS: list[Expected] = [
    *[
        Member(_MODELS + where, name, f"the head of {whose}")
        for where, whose in _LANGUAGE.items()
        for name in ("lm_head", "logits_processor")
    ],
    *[
        Member(_MODELS + where, "compute_logits", "logits of the kept rows", takes=("hidden_states",))
        for where in _VISION
    ],
    *[Member(_MODELS + where, "get_language_model", "where the head is") for where in _VISION],
    *[
        Member(_MODELS + where, "make_empty_intermediate_tensors", "first buffer of a later stage")
        for where in _VISION
    ],
    Call(
        "model_executor/layers/vocab_parallel_embedding.py:UnquantizedEmbeddingMethod.create_weights",
        "register_parameter",
        "the head's weight",
        ("'weight'", "weight"),
    ),
    *_members(_HEAD, "the head, or a rank's shard of it", "bias quant_method shard_indices tp_size"),
    Member(
        "model_executor/layers/vocab_parallel_embedding.py", "UnquantizedEmbeddingMethod", "a head as it is"
    ),
    Member("model_executor/layers/linear.py", "UnquantizedLinearMethod", "a head as it is"),
    Member("config/model.py:ModelConfig", "head_dtype", "what the head computes in"),
    *_members(_SHARD, "rows that belong to real tokens", "org_vocab_start_index org_vocab_end_index"),
    Member("model_executor/layers/logits_processor.py:LogitsProcessor", "soft_cap", "logits must be linear"),
]

_OFFLINE: list[Expected] = [
    *[Text("__init__.py", name, "the engine's door") for name in ("LLM", "SamplingParams")],
    Member("__init__.py", "__version__", "which release this is"),
    Member(_LLM, "enqueue", "one sample", takes=("prompts", "sampling_params"), keywords=("use_tqdm",)),
    Member(_LLM, "wait_for_completion", "all samples", keywords=("use_tqdm",)),
    Member(_LLM, "collective_rpc", "a method of every worker", takes=("method",), keywords=("args",)),
    Member(_LLM, "reset_prefix_cache", "samples that do not depend on earlier ones"),
    *_members(
        "v1/engine/llm_engine.py:LLMEngine",
        "samples that do not depend on earlier ones",
        "reset_mm_cache reset_encoder_cache",
    ),
    Member("envs.py", "disable_envs_cache", "settings of the environment are read again"),
    Member(_LLM, "llm_engine", "its processes"),
    Call(f"{_LLM}.__init__", "EngineArgs", "engine arguments are its fields", ("model=model",)),
    *_members("v1/engine/llm_engine.py:LLMEngine", "its processes", "engine_core model_config"),
    Member("v1/engine/core_client.py:EngineCoreClient", "shutdown", "end of its processes"),
    *_members("outputs.py:RequestOutput", "a finished sample", "prompt_token_ids prompt_logprobs outputs"),
    *_members("outputs.py:CompletionOutput", "the teacher's answer", "token_ids finish_reason"),
    *_members("logprobs.py:FlatLogprobs", "public capture", "token_ids logprobs"),
    *_members(
        "inputs/llm.py:TokensPrompt",
        "a sample as it is given",
        "prompt_token_ids multi_modal_data multi_modal_uuids",
    ),
    *_members("exceptions.py", "errors that are caught", "VLLMError VLLMClientError"),
    Member("platforms/__init__.py", "current_platform", "whether this is a CPU"),
    Member("platforms/interface.py:Platform", "is_cpu", "whether this is a CPU"),
    *_members(
        "sampling_params.py:SamplingParams",
        "what a sample asks for",
        "max_tokens temperature seed detokenize logit_bias extra_args skip_reading_prefix_cache "
        "prompt_logprobs flat_logprobs",
    ),
]

_ARGUMENTS: list[Expected] = _members(
    "engine/arg_utils.py:EngineArgs",
    "an engine argument",
    "model revision tokenizer dtype quantization max_model_len max_num_seqs max_num_batched_tokens "
    "tensor_parallel_size pipeline_parallel_size seed enforce_eager enable_prefix_caching async_scheduling "
    "disable_log_stats use_tqdm_on_load worker_extension_cls mm_processor_kwargs max_logprobs logprobs_mode "
    "block_size compilation_config cpu_offload_gb disable_custom_all_reduce distributed_executor_backend "
    "download_dir enable_chunked_prefill gpu_memory_utilization kv_cache_memory_bytes limit_mm_per_prompt "
    "load_format max_parallel_loading_workers mm_processor_cache_gb code_revision tokenizer_revision "
    "hf_config_path hf_overrides hf_token model_weights data_parallel_size served_model_name",
)

_ENVIRONMENT: list[Expected] = [
    Text("envs.py", name, "a setting of the environment")
    for name in (
        "DO_NOT_TRACK",
        "VLLM_BATCH_INVARIANT",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
        "VLLM_WORKER_MULTIPROC_METHOD",
    )
]

EXPECTED: tuple[Expected, ...] = (
    *_RUNNERS,
    *_V1_SEAM,
    *_V2_SEAM,
    *_REQUESTS,
    *_WORKERS,
    *_HEADS,
    *_OFFLINE,
    *_ARGUMENTS,
    *_ENVIRONMENT,
)
"""All of it, from the inside out."""

UNCHECKED = (
    "hidden states are those after the last norm, row by row those of the scheduled tokens: tests compare "
    "captured logits with transformers, and `teacher-dump verify` does on any machine"
)
"""What a source check cannot show."""


OPTIONAL = {"swa_bounded_replay"}
"""Engine arguments that are given only where vLLM has them."""


def names_used(expected: Iterable[Expected] = EXPECTED) -> set[str]:
    """Names that teacher_dump itself looks up or gives; what vLLM calls inside is not among them."""
    named = {each.name for each in expected if isinstance(each, Member | Text)}
    return (named - {"_bookkeeping_sync"}) | {"envs", "weight"} | OPTIONAL
