"""Where the capture hooks into vLLM's model runners: private attributes, looked up and checked once.

    execute_model(scheduler_output)             new requests and finished ones are learnt here
    V1  _get_prompt_logprobs_dict(hidden, …)    called every step with the flattened hidden states
    V2  prompt_logprobs_worker.compute_prompt_logprobs(logits_fn, hidden, batch, …)     likewise

Both give the final hidden states (after the last norm) of all scheduled tokens, and the order of the
requests in them. vLLM 0.32 runs V2 where Triton works (GPUs) and V1 on CPUs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import EngineError
from common.tested_versions import TESTED_VLLM

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Slice(NamedTuple):
    """One request's share of a step."""

    request_id: str
    """vLLM's id."""
    offset: int
    """Its first row in the flattened batch."""
    start: int
    """Position of that row in the sequence."""
    num_rows: int
    """Rows."""


Learn = Callable[[Any], None]
Step = Callable[[Tensor, Tensor, list[Slice]], None]


def attach(runner: Any, *, learn: Learn, step: Step, last_stage: bool) -> str:
    """Call `learn(scheduler_output)` before, and `step(hidden, input_ids, slices)` inside every step.

    Args:
        runner: The worker's model runner.
        learn: Told of every scheduler output before it runs.
        step: Given the flattened [tokens, D] hidden states, [tokens] input ids and who owns which rows.
        last_stage: Whether this worker holds the last pipeline stage; others have no hidden states.

    Returns:
        `"V1"` or `"V2"`.

    Raises:
        EngineError: An attribute is missing: this vLLM is not one that was tested.
    """
    inner = _need(runner, "execute_model")

    def execute_model(scheduler_output: Any, *args: Any, **options: Any) -> Any:
        learn(scheduler_output)
        return inner(scheduler_output, *args, **options)

    runner.execute_model = execute_model
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        _attach_v1(runner, step)
        return "V1"
    if last_stage:
        _attach_v2(runner, step)
    return "V2"


def _attach_v1(runner: Any, step: Step) -> None:
    for path in ("query_start_loc.np", "requests", "input_batch.req_ids", "input_ids.gpu"):
        _need(runner, path)
    inner = _need(runner, "_get_prompt_logprobs_dict")

    def get_prompt_logprobs_dict(hidden: Tensor, num_scheduled: dict[str, int]) -> Any:
        offsets = runner.query_start_loc.np
        slices = [
            Slice(name, int(offsets[index]), runner.requests[name].num_computed_tokens, num_scheduled[name])
            for index, name in enumerate(runner.input_batch.req_ids)
            if name in num_scheduled
        ]
        step(hidden, runner.input_ids.gpu, slices)
        return inner(hidden, num_scheduled)

    runner._get_prompt_logprobs_dict = get_prompt_logprobs_dict


def _attach_v2(runner: Any, step: Step) -> None:
    worker = _need(runner, "prompt_logprobs_worker")
    inner = _need(worker, "compute_prompt_logprobs")

    def compute_prompt_logprobs(
        logits_fn: Any, hidden: Tensor, batch: Any, *args: Any, **options: Any
    ) -> Any:
        for path in (
            "req_ids",
            "query_start_loc_np",
            "num_computed_prefill_tokens_np",
            "num_scheduled_tokens",
        ):
            _need(batch, path)
        slices = [
            Slice(
                name,
                int(batch.query_start_loc_np[index]),
                int(batch.num_computed_prefill_tokens_np[index]),
                int(batch.num_scheduled_tokens[index]),
            )
            for index, name in enumerate(batch.req_ids)
        ]
        step(hidden, _need(batch, "input_ids"), slices)
        return inner(logits_fn, hidden, batch, *args, **options)

    worker.compute_prompt_logprobs = compute_prompt_logprobs


def mend_pipeline(runner: Any, first_stage: bool) -> None:
    """Give a later V1 stage the buffer that 0.32 forgets when nothing warms it up (CPU, eager)."""
    if not first_stage and getattr(runner, "intermediate_tensors", 0) is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def find_head(model: Any) -> Any:
    """The language model's head, whose weight is [rows, D] (a shard of it under tensor parallelism).

    Raises:
        EngineError: It is not where it is looked for, is quantised, has a bias or a soft cap.
    """
    language = model.get_language_model() if hasattr(model, "get_language_model") else model
    head = getattr(language, "lm_head", None)
    weight = getattr(head, "weight", None)
    if not _is_plain(head) or weight is None or weight.ndim != 2 or not len(weight):
        found = type(getattr(head, "quant_method", None)).__name__
        raise EngineError(
            f"{type(model).__name__} has no plain lm_head.weight to relate logits with (its head is "
            f"{getattr(weight, 'dtype', 'missing')} under {found}); use --relation-of hidden"
        )
    if getattr(head, "bias", None) is not None:
        raise EngineError(f"{type(model).__name__} has a head with a bias; use --relation-of hidden")
    if getattr(getattr(language, "logits_processor", None), "soft_cap", None):
        raise EngineError(
            f"{type(model).__name__} caps its logits softly, so they are not linear; use --relation-of hidden"
        )
    return head


def _is_plain(head: Any) -> bool:
    """Whether the head's weight is what it multiplies by: no scales, no packing."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method, weight = getattr(head, "quant_method", None), getattr(head, "weight", None)
    return (
        isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        and getattr(weight, "dtype", None) in _PLAIN
    )


@torch.inference_mode()
def logits_dtype(model: Any, *, like: Tensor, vocab_size: int) -> str:
    """The coarsest dtype that holds every logit of two random states: a model may widen what it has rounded.

    Every rank of a tensor-parallel group has to call it, because `compute_logits` gathers.

    Args:
        model: The worker's model.
        like: [0, D] of the dtype and on the device of its final hidden states.
        vocab_size: Real tokens.
    """
    states = torch.randn(2, like.shape[1], generator=torch.Generator().manual_seed(0))
    logits = model.compute_logits(states.to(like))[:, :vocab_size]
    if logits.any():
        for coarse in (torch.bfloat16, torch.float16):
            if torch.equal(logits.to(coarse).to(logits.dtype), logits):
                return _name(coarse)
    return _name(logits.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def real_rows(head: Any, vocab_size: int) -> Tensor:
    """[rows, D] rows of a head (or of this rank's shard of it) that belong to real tokens.

    Args:
        head: From `find_head`.
        vocab_size: Real tokens of the whole head.
    """
    shard = getattr(head, "shard_indices", None)
    start = shard.org_vocab_start_index if shard else 0
    stop = shard.org_vocab_end_index if shard else len(head.weight)
    weight: Tensor = head.weight
    return weight[: max(0, min(vocab_size, stop) - start)]


def _need(owner: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(owner, name):
            raise EngineError(
                f"this vLLM has no {type(owner).__module__}.{type(owner).__name__}.{name}, which the capture "
                f"hooks; tested: vllm {', '.join(TESTED_VLLM)}; install one of them, or keep likeliest ids "
                "alone with --capture prompt-logprobs --relation-store none"
            )
        owner = getattr(owner, name)
    return owner
