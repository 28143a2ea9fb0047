"""The interface to vLLM: start it, submit a group of samples, collect what the capture kept.

    with Engine(settings) as engine:
        answers = engine.answer(questions)      the teacher's own answers, where it gives them
        results = engine.run(submissions)       one Captured per submission, in order

With the prefix cache on, a sample that asks for no image of its own takes up the image's keys and
values from an earlier one; its own rows are computed, or requested again without the cache.

A group is submitted and drained as a whole, so the batches that vLLM forms depend on the samples
alone and a rerun gives the same bits with the engine in this process on a CPU. Elsewhere batches depend
on when samples arrive, and a rerun gives the same values up to rounding.

The engine names each image by the hash of the very pixels it hands to vLLM, and the capture refuses
a sample whose images are not the ones that its prompt was made from.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from common.chat import Prompt
from common.errors import CascacheError, ConfigError, EngineError, EngineStopped
from common.pixels import PixelBounds
from teacher_dump.arguments import check_arguments, known_arguments
from teacher_dump.environment import BATCH_INVARIANT
from teacher_dump.head import head_overrides
from teacher_dump.request import (
    EXTRA_ARG,
    ROWS_MISSING,
    Captured,
    CaptureRequest,
    CaptureSettings,
    pixel_identity,
)
from teacher_dump.start import EngineLog, import_vllm, on_cpu, set_environment, vllm_errors
from teacher_dump.watch import call_watched, engine_processes, this_driver

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MAX_BIASED_IDS = 1024
"""Ids whose probability vLLM's V2 runner changes for one request; more of them end the worker."""
_EXTENSION = "teacher_dump.capture.CaptureExtension"


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
    head_dtype: str = "float32"
    """What the head's product is computed and kept in; never `auto`."""
    quantization: str | None = None
    """vLLM's name of a quantisation to load the weights in."""
    max_num_seqs: int = 64
    """Samples computed at a time."""
    max_num_batched_tokens: int | None = None
    """Positions per step; None chooses a value that fits a whole sample."""
    tensor_parallel: int = 1
    """Devices that each layer is spread over."""
    pipeline_parallel: int = 1
    """Groups of devices that layers are spread over."""
    inside: bool | None = None
    """Run in this process (on a CPU a rerun gives the same bits); None: on a CPU with one worker."""
    prefix_cache: bool = False
    """Whether later samples take up what earlier ones computed of a common prefix."""
    batch_invariant: bool = False
    """Have vLLM choose kernels whose values do not depend on what is computed together."""
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
    """A prompt for the teacher to continue."""

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
    """What the teacher generated, or why it did not."""

    token_ids: NDArray[np.int32]
    """[n] ids, the end-of-turn token included when it came."""
    finished: bool
    """Whether the teacher ended by itself."""
    problem: str | None = None
    """What went wrong, as a message."""
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
        self.head_dtype = ""
        self._log = EngineLog(kept=False)
        self._processes: list[BaseProcess] = []
        self._stopped = self._masked = False

    def __enter__(self) -> Self:
        """Start vLLM.

        Raises:
            EngineError: It is missing, untested, or lacks what the capture hooks.
            ConfigError: It refuses the settings.
        """
        if self.settings.batch_invariant:
            os.environ[BATCH_INVARIANT] = "1"  # read while vllm's modules are imported
        vllm = import_vllm(any_version=self.settings.any_version)
        arguments = self._arguments()
        self._stopped = self._masked = False
        self._log = EngineLog(kept=os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1")
        try:
            with (
                self._log.redirected(),
                warnings.catch_warnings(),
            ):  # vllm's own imports, on first touch of LLM
                warnings.simplefilter("ignore", FutureWarning)
                self._llm = vllm.LLM(**arguments)
        except (ValueError, TypeError, vllm_errors()[1]) as error:
            raise ConfigError(
                f"vLLM refuses {self.settings.model} with these settings: {self._log.explain(error)}; "
                "change them, --engine-arg among them"
            ) from error
        except Exception as error:  # vLLM, torch and drivers raise whatever they like while they start
            raise EngineError(
                f"vLLM could not start {self.settings.model}: {self._log.explain(error)}; "
                "VLLM_LOGGING_LEVEL=INFO shows what it does"
            ) from error
        self._processes = engine_processes()
        with self._stopping("taking up the capture"):
            self.runner, self.dtype = self._install()
            self.head_dtype = self._measure_head()
        for what, flag, found, wanted in (
            ("computes", "--dtype", self.dtype, self.settings.dtype),
            ("gives logits", "--head-dtype", self.head_dtype, self.settings.head_dtype),
        ):
            if found != wanted:
                self.close()
                raise EngineError(
                    f"vLLM {what} in {found}, the level is to be in {wanted}; "
                    f"ask for {flag} {found}, or find what overrides it"
                )
        log.info("vLLM %s runs %s on its %s runner", vllm.__version__, self.settings.model, self.runner)
        return self

    def _install(self) -> tuple[str, str]:
        """Put the capture into the workers; which model runner they have, and the dtype they compute in."""
        who = asdict(self.settings.capture), asdict(this_driver())
        answers = self._call(lambda: self._llm.collective_rpc("cascache_install", args=who))
        for answer in answers:
            if "problem" in answer:
                self.close()
                raise EngineError(answer["problem"])
        return answers[0]["runner"], answers[0]["dtype"]

    def _measure_head(self) -> str:
        """The dtype of the logits that the workers really compute."""
        wanted = (self.settings.capture.vocab_size,)
        answers = self._call(lambda: self._llm.collective_rpc("cascache_head_dtype", args=wanted))
        return str(next(each for each in answers if each is not None))  # the last pipeline stage has the head

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
            if not self._stopped:
                self._log.discard()

    def restart(self) -> None:
        """Start vLLM again after it died, from now on in a process of its own.

        Raises:
            EngineError: As on entering.
            ConfigError: As on entering.
        """
        from vllm import envs

        self.close()
        self.settings = replace(self.settings, inside=False)
        envs.disable_envs_cache()  # vLLM caches the variable that chooses the process
        self.__enter__()

    def _wait(self) -> Any:
        return self._call(lambda: self._llm.wait_for_completion(use_tqdm=False))

    def _call(self, action: Callable[[], Any]) -> Any:
        return call_watched(action, self._processes)

    @contextlib.contextmanager
    def _stopping(self, doing: str) -> Iterator[None]:
        """Whatever vLLM raises meanwhile means that it stopped: it has no error class for that."""
        try:
            yield
        except CascacheError:
            raise
        except Exception as error:  # see above: any of them ends the engine
            self._stopped = True
            raise EngineStopped(
                f"vLLM stopped while {doing}: {self._log.explain(error)}; "
                "run the same command again to resume"
            ) from error

    def run(self, submissions: Sequence[Submission]) -> list[Captured]:
        """Compute a group of samples.

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
        """Compute a group; `whole` takes nothing from the prefix cache."""
        refused: dict[str, Captured] = {}
        submitted: list[Submission] = []
        with self._stopping("computing"):
            for each in submissions:
                try:
                    self._submit(each, whole=whole)
                    submitted.append(each)
                except (ValueError, TypeError, vllm_errors()[1]) as error:
                    refused[each.request.key] = Captured(each.request.key, str(error), "engine-refused")
            outputs = self._wait() if submitted else []
            finished = self._collect(submitted, outputs)
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
        drained = self._call(lambda: self._llm.collective_rpc("cascache_drain"))
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

    def forget_images(self) -> None:
        """Empty the caches of processed and encoded images: a second pass then costs what a first does."""
        if self._llm is not None:
            self._llm.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Let the teacher answer a group of questions.

        Returns:
            One answer per question, in order; a refused one carries its problem.

        Raises:
            EngineError: vLLM itself broke.
        """
        refused: dict[int, Answer] = {}
        with self._stopping("answering"):
            if not self._masked:
                self._mask_padding()
                self._masked = True
            for index, each in enumerate(questions):
                try:
                    self._ask(each)
                except (ValueError, TypeError, vllm_errors()[1]) as error:
                    refused[index] = Answer(np.empty(0, np.int32), finished=False, problem=str(error))
            outputs = self._wait() if len(refused) < len(questions) else []
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
            logit_bias=dict.fromkeys(self._biased(question.banned), -math.inf),
        )
        self._llm.enqueue([_to_vllm(question.prompt, question.pixels)], [params], use_tqdm=False)

    def _mask_padding(self) -> None:
        """Have the workers give padding rows of the head no probability; vLLM takes few biased ids."""
        self._call(lambda: self._llm.collective_rpc("cascache_mask_padding"))

    def _biased(self, banned: Sequence[int]) -> list[int]:
        """Those of the banned ids that every question passes to vLLM."""
        return [each for each in banned if each < self.settings.capture.vocab_size]

    def forget(self) -> None:
        """Empty the prefix cache, so that what follows does not depend on what came before.

        Raises:
            EngineError: vLLM does not clear it, although nothing is being computed.
        """
        with self._stopping("emptying its prefix cache"):
            emptied = self._llm is None or self._call(self._llm.reset_prefix_cache)
        if not emptied:
            raise EngineError("vLLM did not clear its prefix cache; run again with --no-prefix-cache")

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        num_workers = settings.tensor_parallel * settings.pipeline_parallel
        inside = settings.inside if settings.inside is not None else num_workers == 1 and on_cpu()
        set_environment(inside=inside, num_workers=num_workers)
        batched = settings.max_num_batched_tokens or max(4096 if on_cpu() else 16384, settings.max_len + 1)
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
            **({"quantization": settings.quantization} if settings.quantization else {}),
            # its default computes some models' last layers on the end of a prompt only
            **({"swa_bounded_replay": False} if "swa_bounded_replay" in known_arguments() else {}),
            # With the engine, not with requests: there they would rename the images.
            **({"mm_processor_kwargs": settings.pixels.engine_arguments} if settings.pixels else {}),
            **settings.arguments,
            **self._head(),
        }

    def _head(self) -> dict[str, Any]:
        """What makes the head compute in its dtype, where that is not the model's own."""
        settings = self.settings
        if settings.head_dtype == settings.dtype:
            return {}
        given = settings.arguments.get("hf_overrides") or {}
        return {"hf_overrides": head_overrides(settings.model, settings.head_dtype, given)}


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
        return Answer(given, finished, "the teacher generated an empty response", "empty-response")
    return Answer(given, finished)


def _differ(found: "np.ndarray[Any, Any]", prompt: Prompt) -> str:
    return (
        f"vLLM computed {len(found)} positions, the processor's prompt has {len(prompt.token_ids)}; "
        "teacher and processor disagree about this image"
    )
