"""Engine cases for `forked`: each starts an engine, and returns what the capture said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import CascacheError
from common.pixels import set_bounds
from common.processor import ProcessorOptions, load_processor
from schemas.manifest import Capture
from teacher_dump.engine import Engine, EngineSettings
from teacher_dump.public import choose_engine
from teacher_dump.records import PartCapture
from teacher_dump.request import Captured, CaptureSettings
from tests.teacher_dump.examples import prepare, questions_on_one_image, samples, submission

TOPK = 64


def settings(model: Path, **changes: Any) -> EngineSettings:
    capture = CaptureSettings(
        topk=TOPK,
        visual_topk=TOPK,
        vocab_size=len(load_processor(str(model)).tokenizer),
        temperatures=(1.0, 2.0),
        store="both",
        chunk_rows=19,
    )
    return replace(
        EngineSettings(str(model), None, "float32", 1024, capture, inside=True, max_num_seqs=16), **changes
    )


def capture(models: Path, family: str, batched: str) -> dict[str, Any]:
    """Every sample captured, and vLLM's own prompt_logprobs of the same engine."""
    processor = load_processor(str(models / family))
    items = [prepare(processor, each) for each in samples()]
    with Engine(
        settings(models / family, max_num_batched_tokens=int(batched), arguments={"max_logprobs": 2048})
    ) as engine:
        found = engine.run([submission(each) for each in items])
        return {"captured": found, "oracle": _prompt_logprobs(engine, items[0]), "runner": engine.runner}


BOUNDS = ProcessorOptions(min_pixels=4500, max_pixels=5500)
"""Some of the pictures have a larger area, some a smaller one."""


def bounded(models: Path, family: str) -> dict[str, Any]:
    """Every sample captured with its images scaled into BOUNDS, by the driver and by the engine.

    The model names its own bounds `min_pixels` and `max_pixels`, as Qwen2.5-VL does on the hub.
    """
    model = models / "by-pixels" / family
    shutil.copytree(models / family, model)
    file = model / "processor_config.json"
    config = json.loads(file.read_text())
    size = config["image_processor"].pop("size")
    config["image_processor"] |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    file.write_text(json.dumps(config))
    processor = load_processor(str(model), options=BOUNDS)
    with Engine(settings(model, pixels=set_bounds(processor))) as engine:
        found = engine.run([submission(prepare(processor, each)) for each in samples()])
        from vllm.transformers_utils.processor import cached_get_processor

        return {"captured": found, "loaded": cached_get_processor.cache_info().misses}


def _prompt_logprobs(engine: Engine, item: Any) -> list[dict[int, float]]:
    """Of every position, the log-probabilities of all rows of the head."""
    from vllm import SamplingParams

    prompt = {
        "prompt_token_ids": item.prompt.prompt_ids.tolist(),
        "multi_modal_data": {"image": list(item.pixels)},
    }
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=-1)
    output = engine._llm.generate([prompt], params, use_tqdm=False)[0]
    return [{token: each.logprob for token, each in (row or {}).items()} for row in output.prompt_logprobs]


def parallel(models: Path, family: str, tensor: str, pipeline: str) -> dict[str, Any]:
    """Every sample captured by two workers, which share each layer or take half of the layers each."""
    processor = load_processor(str(models / family))
    wanted = settings(
        models / family, inside=False, tensor_parallel=int(tensor), pipeline_parallel=int(pipeline)
    )
    with Engine(wanted) as engine:
        found = engine.run([submission(prepare(processor, each)) for each in samples()])
        return {"captured": found, "runner": engine.runner}


def tampered(models: Path, family: str) -> dict[str, Captured]:
    """What the engine says to samples whose images or positions were tampered with after preparation."""
    processor = load_processor(str(models / family))
    items = {each.sample_id: prepare(processor, each) for each in samples()}
    one, two, other = (submission(items[name]) for name in ("one-0", "two", "one-1"))
    with Engine(settings(models / family)) as engine:
        cases = {
            "untouched": two,
            "swapped": replace(two, pixels=two.pixels[::-1]),
            "dropped": replace(two, pixels=two.pixels[:1]),
            "duplicated": replace(two, pixels=(two.pixels[0], two.pixels[0])),
            "another": replace(one, pixels=other.pixels),
            "none": replace(one, pixels=()),
            "shifted-image": replace(one, request=_shift_images(one.request)),
            "shifted-tokens": replace(
                one, request=replace(one.request, token_sha256=other.request.token_sha256)
            ),
            "after": one,
        }
        return {name: engine.run([each])[0] for name, each in cases.items()}


def _shift_images(request: Any) -> Any:
    return replace(
        request, images=tuple(replace(i, start=i.start + 1, stop=i.stop + 1) for i in request.images)
    )


def shifted_rows(models: Path, family: str) -> Captured:
    """What the capture says when the runner's rows are off by one."""
    from teacher_dump import seams

    honest = seams.Slice
    seams.Slice = lambda name, offset, start, rows: honest(name, offset, start + 1, rows - 1)  # type: ignore
    processor = load_processor(str(models / family))
    with Engine(settings(models / family)) as engine:
        return engine.run([submission(prepare(processor, samples()[0]))])[0]


def preempted(models: Path, family: str) -> dict[str, Any]:
    """Every sample captured while the KV cache is far too small for all of them at a time."""
    processor = load_processor(str(models / family))
    small = {
        "num_gpu_blocks_override": 8,
        "block_size": 32,
        "scheduler_reserve_full_isl": False,
        "long_prefill_token_threshold": 20,
    }
    with Engine(
        settings(models / family, max_len=207, max_num_batched_tokens=160, arguments=small)
    ) as engine:
        runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        seen: list[str] = []
        inner = runner.execute_model

        def execute_model(scheduler_output: Any, *arguments: Any) -> Any:
            seen.extend(scheduler_output.preempted_req_ids or ())
            return inner(scheduler_output, *arguments)

        runner.execute_model = execute_model
        found = engine.run([submission(prepare(processor, each)) for each in samples()])
        return {"captured": found, "preemptions": len(seen)}


def shared(models: Path, family: str, cached: str) -> dict[str, Any]:
    """A part of many questions on one image, with vLLM's prefix cache on or off."""
    processor = load_processor(str(models / family))
    items = [prepare(processor, each) for each in questions_on_one_image()]
    wanted = settings(models / family, prefix_cache=cached == "on", arguments={"block_size": 32})
    with Engine(wanted) as engine:
        runner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        computed, waves = [0], [0]
        inner, run = runner.execute_model, engine._run

        def execute_model(scheduler_output: Any, *arguments: Any) -> Any:
            computed[0] += scheduler_output.total_num_scheduled_tokens
            return inner(scheduler_output, *arguments)

        def counted(*arguments: Any, **options: Any) -> Any:
            waves[0] += 1
            return run(*arguments, **options)

        runner.execute_model, engine._run = execute_model, counted  # type: ignore[method-assign]
        part = PartCapture(engine, Capture(topk=TOPK, visual_topk=TOPK, temperatures=(1.0, 2.0)), wave=5)
        results = [each for done in part.run(items) for each in done]
        again = [each for done in part.run(items) for each in done]
        return {"results": results, "again": again, "computed": computed[0] // 2, "waves": waves[0] // 2}


def public(models: Path, family: str) -> dict[str, Any]:
    """Rows through prompt_logprobs in a vLLM whose seam has another name; a head without padding rows."""
    _rename_seam()
    model = models / "unpadded" / family
    processor = load_processor(str(model))
    items = [prepare(processor, each) for each in samples()]
    size = len(processor.tokenizer)
    plain = CaptureSettings(topk=TOPK, visual_topk=8, vocab_size=size, store="none")
    with choose_engine(settings(model, capture=plain, hooks=False, vocab_rows=size)) as engine:
        first = submission(items[0])
        end = replace(first.request, response_rows=np.array([first.request.num_positions - 1], np.int32))
        return {
            "captured": engine.run([submission(each) for each in items]),
            "beyond": engine.run([replace(first, request=end)])[0],
        }


def _rename_seam() -> None:
    """Rename the attribute that the capture hooks, where it is defined and where it is called."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    old, new = "_get_prompt_logprobs_dict", "_another_name"
    setattr(GPUModelRunner, new, getattr(GPUModelRunner, old))
    delattr(GPUModelRunner, old)
    for each in vars(GPUModelRunner).values():
        function = getattr(each, "__wrapped__", each)
        code = getattr(function, "__code__", None)
        if code is not None and old in code.co_names:
            names = tuple(new if name == old else name for name in code.co_names)
            function.__code__ = code.replace(co_names=names)


def missing_seam(models: Path, family: str) -> str:
    """What starting says when an attribute that the capture hooks is gone."""
    _rename_seam()
    return _refusal(settings(models / family))


def vanishing(models: Path, family: str) -> str:
    """What starting says of an untested vLLM."""
    import vllm

    vllm.__version__ = "9.9.9"
    return _refusal(settings(models / family))


def _refusal(wanted: EngineSettings) -> str:
    try:
        with Engine(wanted):
            return "started"
    except CascacheError as error:
        return f"{type(error).__name__}: {error}"
