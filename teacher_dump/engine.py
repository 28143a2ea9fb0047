"""The only door to vLLM: start it, hand it a wave of samples, take out what the capture kept.

    with Engine(settings) as engine:
        answers = engine.answer(questions)      the teacher's own answers, where it gives them
        results = engine.run(submissions)       one Captured per submission, in order

With the prefix cache on, a sample that asks for no image of its own takes up the image's keys and
values from an earlier one; what it wants itself is computed, or asked for again without the cache.

A wave is submitted whole and drained whole, so the batches that vLLM forms depend on the samples
alone and a rerun gives the same bits (with the engine in this process; see `EngineSettings.inside`).

The engine names each image by the hash of the very pixels it hands to vLLM, and the capture refuses
a sample whose images are not the ones that its prompt was made from.
"""

import contextlib
import json
import logging
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from common.chat import Prompt
from common.errors import ConfigError, EngineError, EngineStopped
from common.pixels import PixelBounds
from teacher_dump.request import (
    EXTRA_ARG,
    ROWS_MISSING,
    Captured,
    CaptureRequest,
    CaptureSettings,
    pixel_identity,
)
from teacher_dump.seams import TESTED_VLLM

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_EXTENSION = "teacher_dump.capture.CaptureExtension"
_OWNED_ARGUMENTS = {
    "model": "--model",
    "revision": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "max_model_len": "--max-len",
    "max_num_seqs": "--max-num-seqs",
    "tensor_parallel_size": "--tensor-parallel",
    "pipeline_parallel_size": "--pipeline-parallel",
    "seed": "--seed",
    "enable_prefix_caching": "--prefix-cache",
    "worker_extension_cls": None,
    "mm_processor_kwargs": "--max-pixels and --min-pixels",
}
"""vLLM arguments that the dump sets itself, and the flag that says the same."""

_HARMLESS_ARGUMENTS = frozenset(
    {
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "limit_mm_per_prompt",
        "load_format",
        "max_num_batched_tokens",
        "max_parallel_loading_workers",
        "mm_processor_cache_gb",
        "swap_space",
    }
)
"""vLLM arguments that change speed and memory, not what is computed (rounding aside)."""

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's own choice is 92 % of the memory
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; saves the compiler's start-up
}


QUIET_LOGGERS = (
    "torch",  # says on every CPU that Triton is missing
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",  # a cap on videos, of which there are none
    "transformers.models.qwen3_vl.video_processing_qwen3_vl",
    "transformers.tokenization_utils_base",  # vLLM starts with a prompt too long; ours are checked
)
"""Loggers whose warnings would only cut up the progress bar."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to start vLLM."""

    model: str
    """Directory or hub id."""
    revision: str | None
    """Of a hub id."""
    dtype: str
    """`float32`, `bfloat16` or `float16`; never `auto`."""
    max_len: int
    """Longest expanded sequence that will be submitted."""
    capture: CaptureSettings
    """What to keep."""
    max_num_seqs: int = 64
    """Samples computed at a time."""
    max_num_batched_tokens: int | None = None
    """Positions a step; None chooses one that holds a whole sample."""
    tensor_parallel: int = 1
    """Devices a layer is spread over."""
    pipeline_parallel: int = 1
    """Groups of devices that layers are spread over."""
    inside: bool | None = None
    """Run in this process (a rerun gives the same bits; dies with it); None: on a CPU with one worker."""
    prefix_cache: bool = False
    """Whether later samples take up what earlier ones computed of a common prefix."""
    seed: int = 0
    """vLLM's own; answers carry seeds of their own."""
    any_version: bool = False
    """Start a vLLM that was not tested."""
    hooks: bool = True
    """Keep rows through private attributes of vLLM; else see `teacher_dump.public`."""
    vocab_rows: int = 0
    """Rows of the head, padding included; wanted without hooks."""
    pixels: PixelBounds | None = None
    """Area that images are scaled into, as the driver's processor does; None: as the model's own does."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further vLLM engine arguments."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One sample, ready to compute."""

    request: CaptureRequest
    """What to keep, and what the worker must find."""
    prompt: Prompt
    """Its tokens."""
    pixels: tuple["Image", ...]
    """Its images, decoded."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt for the teacher to go on from."""

    prompt: Prompt
    """Its tokens."""
    pixels: tuple["Image", ...]
    """Its images, decoded."""
    max_tokens: int
    """Longest answer."""
    temperature: float
    """0 takes the likeliest token."""
    seed: int
    """Of the draws, below 2⁶³."""
    banned: tuple[int, ...]
    """Ids that never come in an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher said, or why not."""

    token_ids: NDArray[np.int32]
    """[n] ids, the end-of-turn token included when it came."""
    finished: bool
    """Whether the teacher ended by itself."""
    problem: str | None = None
    """What went wrong, in words."""
    reason: str = "engine-refused"
    """One word for it."""


class Engine:
    """vLLM with the capture installed."""

    def __init__(self, settings: EngineSettings) -> None:
        check_arguments(settings.arguments)
        self.settings = settings
        self._llm: Any = None
        self.runner = ""
        self.dtype = ""

    def __enter__(self) -> Self:
        """Start vLLM.

        Raises:
            EngineError: It is missing, untested, or lacks what the capture hooks.
            ConfigError: It refuses the settings.
        """
        vllm = _import_vllm(any_version=self.settings.any_version)
        arguments = self._arguments()
        try:
            with warnings.catch_warnings():  # vllm's own imports, on first touch of LLM
                warnings.simplefilter("ignore", FutureWarning)
                self._llm = vllm.LLM(**arguments)
        except (ValueError, TypeError, _vllm_errors()[1]) as error:
            raise ConfigError(f"vLLM refuses {self.settings.model} with these settings: {error}") from error
        except (RuntimeError, OSError, MemoryError, _vllm_errors()[0]) as error:
            raise EngineError(
                f"vLLM could not start {self.settings.model}: {error}; VLLM_LOGGING_LEVEL=INFO shows its log"
            ) from error
        self.runner, self.dtype = self._install()
        if self.dtype != self.settings.dtype:
            self.close()
            raise EngineError(
                f"vLLM computes in {self.dtype}, the level is to be in {self.settings.dtype}; "
                f"ask for --dtype {self.dtype}, or find what overrides it"
            )
        log.info("vLLM %s runs %s on its %s runner", vllm.__version__, self.settings.model, self.runner)
        return self

    def _install(self) -> tuple[str, str]:
        """Put the capture into the workers; which model runner they have, and the dtype they compute in."""
        who = asdict(self.settings.capture), os.getpid(), platform.node()
        answers = self._llm.collective_rpc("cascache_install", args=who)
        for answer in answers:
            if "problem" in answer:
                self.close()
                raise EngineError(answer["problem"])
        return answers[0]["runner"], answers[0]["dtype"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop vLLM."""
        self.close()

    def close(self) -> None:
        """Stop vLLM and its processes; harmless twice."""
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()

    def run(self, submissions: Sequence[Submission]) -> list[Captured]:
        """Compute a wave of samples.

        Returns:
            One result per submission, in order; a refused one carries its problem.

        Raises:
            EngineError: vLLM itself broke.
        """
        found = self._run(submissions, whole=False)
        lost = [index for index, each in enumerate(found) if each.reason == ROWS_MISSING]
        if lost and self.settings.prefix_cache:
            again = self._run([submissions[index] for index in lost], whole=True)
            for index, each in zip(lost, again, strict=True):
                found[index] = each
        return found

    def _run(self, submissions: Sequence[Submission], *, whole: bool) -> list[Captured]:
        """Compute a wave; `whole` takes nothing from the prefix cache."""
        vllm_error, client_error = _vllm_errors()
        refused: dict[str, Captured] = {}
        submitted: list[Submission] = []
        for each in submissions:
            try:
                self._submit(each, whole=whole)
                submitted.append(each)
            except (ValueError, TypeError, client_error) as error:
                refused[each.request.key] = Captured(each.request.key, str(error), "engine-refused")
        try:
            outputs = self._llm.wait_for_completion(use_tqdm=False) if submitted else []
            finished = self._collect(submitted, outputs)
        except (RuntimeError, vllm_error) as error:
            raise EngineStopped(
                f"vLLM stopped while computing: {error}; run the same command again to resume"
            ) from error
        for each, output in zip(submitted, outputs, strict=True):
            finished.setdefault(
                each.request.key, Captured(each.request.key, "the capture gave no answer", ROWS_MISSING)
            )
            found = np.asarray(output.prompt_token_ids, np.int32)
            if finished[each.request.key].problem is None and not np.array_equal(
                found, each.prompt.token_ids
            ):
                finished[each.request.key] = Captured(
                    each.request.key, _differ(found, each.prompt), "prompt-mismatch"
                )
        return [refused.get(each.request.key) or finished[each.request.key] for each in submissions]

    def _collect(self, submitted: Sequence[Submission], outputs: Sequence[Any]) -> dict[str, Captured]:
        """What was kept of the samples that vLLM has finished, by key."""
        drained = self._llm.collective_rpc("cascache_drain")
        return {each["key"]: Captured.from_wire(each) for rank in drained for each in rank}

    def _wishes(self, submission: Submission, *, whole: bool) -> dict[str, Any]:
        """Sampling parameters that have a sample's rows kept."""
        wanted = whole or any(rows is not None for rows in submission.request.visual_rows)
        return {
            "skip_reading_prefix_cache": wanted or None,
            "extra_args": {EXTRA_ARG: submission.request.to_extra()},
        }

    def _submit(self, submission: Submission, *, whole: bool) -> None:
        from vllm import SamplingParams

        wishes = self._wishes(submission, whole=whole)
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **wishes)
        prompt = _to_vllm(submission.prompt, submission.pixels)
        self._llm.enqueue([prompt], [params], use_tqdm=False)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Let the teacher answer a wave of questions.

        Returns:
            One answer per question, in order; a refused one carries its problem.

        Raises:
            EngineError: vLLM itself broke.
        """
        vllm_error, client_error = _vllm_errors()
        refused: dict[int, Answer] = {}
        for index, each in enumerate(questions):
            try:
                self._ask(each)
            except (ValueError, TypeError, client_error) as error:
                refused[index] = Answer(np.empty(0, np.int32), finished=False, problem=str(error))
        try:
            outputs = self._llm.wait_for_completion(use_tqdm=False) if len(refused) < len(questions) else []
        except (RuntimeError, vllm_error) as error:
            raise EngineStopped(
                f"vLLM stopped while answering: {error}; run the same command again to resume"
            ) from error
        given = iter(outputs)
        return [
            refused[index] if index in refused else _to_answer(each, next(given))
            for index, each in enumerate(questions)
        ]

    def _ask(self, question: Question) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            seed=question.seed,
            detokenize=False,
            logit_bias=dict.fromkeys(question.banned, -math.inf),
        )
        self._llm.enqueue([_to_vllm(question.prompt, question.pixels)], [params], use_tqdm=False)

    def forget(self) -> None:
        """Empty the prefix cache, so that what follows does not depend on what came before.

        Raises:
            EngineError: vLLM keeps it, though nothing is being computed.
        """
        if self._llm is not None and not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not let go of its prefix cache; run again with --no-prefix-cache")

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        num_workers = settings.tensor_parallel * settings.pipeline_parallel
        inside = settings.inside if settings.inside is not None else num_workers == 1 and _on_cpu()
        _set_environment(inside=inside, num_workers=num_workers)
        batched = settings.max_num_batched_tokens or max(4096 if _on_cpu() else 16384, settings.max_len + 1)
        return {
            "model": settings.model,
            "revision": settings.revision,
            "dtype": settings.dtype,
            "max_model_len": settings.max_len + 1,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": batched,
            "tensor_parallel_size": settings.tensor_parallel,
            "pipeline_parallel_size": settings.pipeline_parallel,
            "seed": settings.seed,
            "enforce_eager": True,
            "enable_prefix_caching": settings.prefix_cache,
            "async_scheduling": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": _EXTENSION,
            # With the engine, not with requests: there they would rename the images.
            **({"mm_processor_kwargs": settings.pixels.engine_arguments} if settings.pixels else {}),
            **settings.arguments,
        }


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse vLLM arguments that the capture depends on.

    Raises:
        ConfigError: With the first of them.
    """
    owned = sorted(_OWNED_ARGUMENTS.keys() & arguments.keys())
    if owned:
        flag = _OWNED_ARGUMENTS[owned[0]]
        cure = f"use {flag}" if flag else "leave it out"
        raise ConfigError(f"--engine-arg {owned[0]} is set by the dump itself; {cure}")


def telling_arguments(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Those vLLM arguments that may change what is computed, values as JSON: part of a level's identity."""
    return {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in sorted(arguments.items())
        if name not in _HARMLESS_ARGUMENTS
    }


def _to_vllm(prompt: Prompt, pixels: tuple["Image", ...]) -> dict[str, Any]:
    """A prompt with its images, each named by its pixels."""
    given: dict[str, Any] = {"prompt_token_ids": prompt.prompt_ids.tolist()}
    if pixels:
        given["multi_modal_data"] = {"image": list(pixels)}
        given["multi_modal_uuids"] = {"image": [pixel_identity(each) for each in pixels]}
    return given


def _to_answer(question: Question, output: Any) -> Answer:
    found = np.asarray(output.prompt_token_ids, np.int32)
    given = np.asarray(output.outputs[0].token_ids, np.int32)
    finished = output.outputs[0].finish_reason == "stop"
    if not np.array_equal(found, question.prompt.token_ids):
        return Answer(given, finished, _differ(found, question.prompt), "prompt-mismatch")
    if np.isin(given, question.banned).any():
        return Answer(given, finished, "the answer holds an image token or a padding row", "banned-token")
    if not len(given):
        return Answer(given, finished, "the teacher said nothing at all", "empty-response")
    return Answer(given, finished)


def _import_vllm(*, any_version: bool) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "Passing `min_pixels` and `max_pixels`", FutureWarning)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"the teacher needs vLLM, which does not import here ({error}); "
            "pip install 'cascache[teacher]' for CUDA machines, 'cascache[teacher-cpu]' elsewhere"
        ) from error
    release = str(vllm.__version__).split("+")[0]
    if release not in TESTED_VLLM and not any_version:
        raise EngineError(
            f"found vllm {vllm.__version__}, tested {', '.join(TESTED_VLLM)}; install a tested release, "
            "or try this one with --any-vllm"
        )
    return vllm


def _vllm_errors() -> tuple[type[Exception], type[Exception]]:
    """Every error of vLLM's own, and those among them that one request caused; neither is a RuntimeError."""
    from vllm.exceptions import VLLMClientError, VLLMError

    return VLLMError, VLLMClientError


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _set_environment(*, inside: bool, num_workers: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if inside else "1"
    if not _on_cpu():
        return
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if num_workers > 1:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // num_workers)
        bound = [str(cores[rank * share % len(cores)]) for rank in range(num_workers)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(bound))


def _differ(found: "np.ndarray[Any, Any]", prompt: Prompt) -> str:
    return (
        f"vLLM computed {len(found)} positions, the processor's prompt has {len(prompt.token_ids)}; "
        "teacher and processor disagree about this image"
    )
