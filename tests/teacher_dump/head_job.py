"""Engine cases about the head's dtype for `forked`: bfloat16 teachers, logits kept with their states."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from common.cache.reader import CacheReader
from common.cache.writer import CacheWriter
from common.errors import CascacheError
from common.processor import load_processor
from common.record import Record
from schemas.manifest import Capture, Manifest, Relation
from teacher_dump.cli import main
from teacher_dump.engine import Engine, EngineSettings
from teacher_dump.public import choose_engine
from teacher_dump.records import PartCapture
from teacher_dump.request import CaptureSettings
from teacher_dump.seams import find_head
from tests.common.cache.records import make_manifest
from tests.teacher_dump.dump_job import said, write_data
from tests.teacher_dump.engine_job import settings
from tests.teacher_dump.examples import prepare, samples, submission

TOPK = 64
FULL = 151_936


def bf16(model: Path, head_dtype: str, vocab: int, **changes: Any) -> EngineSettings:
    """Everything kept of a bfloat16 teacher of which every row of the head counts."""
    keep = CaptureSettings(topk=TOPK, visual_topk=TOPK, vocab_size=vocab, store="both", chunk_rows=64)
    wanted = settings(model, dtype="bfloat16", head_dtype=head_dtype, capture=keep)
    return replace(wanted, **changes)


def kept(models: Path, family: str, head_dtype: str, vocab: str) -> dict[str, Any]:
    """Records of every sample as captured, and as a cache gives them back."""
    model = models / vocab / family
    with Engine(bf16(model, head_dtype, int(vocab))) as engine:
        records = _records(engine, model)
        runner = engine.runner
    again = through_cache(records, model.with_name(f"{family}-{head_dtype}-cache"), int(vocab))
    return {"records": records, "cached": again, "runner": runner, "head_dtype": engine.head_dtype}


def _records(engine: Engine, model: Path) -> list[Record]:
    processor = load_processor(str(model))
    part = PartCapture(engine, Capture(topk=TOPK, visual_topk=TOPK), wave=16)
    results = [
        each for done in part.run([prepare(processor, sample) for sample in samples()]) for each in done
    ]
    return [each for each in results if isinstance(each, Record)]


def through_cache(records: list[Record], path: Path, vocab: int) -> list[Record]:
    """Written in the default encoding (states in float32) and read again."""
    states = [each.hidden for record in records for each in record.visual if each.hidden is not None]
    width = states[0].shape[1]
    manifest: Manifest = make_manifest(
        num_samples=len(records), part_samples=len(records), topk=TOPK, vocab=vocab, hidden_size=width
    ).model_copy(update={"relation": Relation(store="both", hidden_encoding="float32")})
    writer = CacheWriter.open(str(path), manifest)
    writer.write_part(0, records, first_sample=0, num_samples=len(records))
    writer.finalize()
    with CacheReader(str(path)) as cache:
        return [cache.read_record(record.sample_id) for record in records]


def parallel(models: Path, family: str, head_dtype: str, vocab: str) -> dict[str, Any]:
    """The same by two workers that share each layer."""
    model = models / vocab / family
    with Engine(bf16(model, head_dtype, int(vocab), inside=False, tensor_parallel=2)) as engine:
        return {"records": _records(engine, model), "runner": engine.runner}


def public(models: Path, family: str, head_dtype: str, vocab: str) -> dict[str, Any]:
    """Rows of a text sample through `prompt_logprobs`, and the same through the hooks."""
    model = models / vocab / family
    item = submission(prepare(load_processor(str(model)), samples()[-1]))
    plain = CaptureSettings(topk=TOPK, visual_topk=8, vocab_size=int(vocab), store="none")
    wanted = bf16(model, head_dtype, int(vocab), capture=plain)
    with choose_engine(replace(wanted, hooks=False, vocab_rows=int(vocab))) as engine:
        return {"captured": engine.run([item])[0], "head_dtype": engine.head_dtype}


def ignored(models: Path, family: str, how: str, vocab: str) -> str:
    """What starting says of a vLLM that does not do what it was asked for."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    honest = LogitsProcessor._apply_head

    def apply_head(self: Any, *arguments: Any) -> Any:
        self.head_dtype = None
        logits = honest(self, *arguments)
        return logits.float() if how == "widened" else logits

    LogitsProcessor._apply_head = apply_head
    try:
        with Engine(bf16(models / vocab / family, "float32", int(vocab))):
            return "started"
    except CascacheError as error:
        return f"{type(error).__name__}: {error}"


def dumped(models: Path, family: str, dtype: str, vocab: str) -> tuple[int, str]:
    """The command itself, beside the models."""
    data = write_data(models / "data", 12)
    out = models / f"dumped-{family}-{dtype}"
    model = str(models / vocab / family)
    return said(lambda: main(["--model", model, "--data", str(data), "--out", str(out), "--dtype", dtype]))


def names(models: Path, family: str, dtype: str, vocab: str) -> list[str]:
    """Names of the engine arguments of the installed vLLM."""
    from vllm.engine.arg_utils import EngineArgs

    return [each.name for each in fields(EngineArgs)]


def quantised(models: Path, family: str, dtype: str, vocab: str) -> dict[str, str]:
    """What is said of heads that vLLM itself has made, by their quantisation, put into a loaded model."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with Engine(bf16(models / vocab / family, "float32", int(vocab))) as engine:
        worker = engine._llm.llm_engine.model_executor.driver_worker.worker
        model = worker.model_runner.model
        language = model.get_language_model()
        with set_current_vllm_config(worker.vllm_config):
            made = {name: ParallelLMHead(1024, 128) for name in ("plain", "excluded", "float8", "scaled")}
        made["excluded"].quant_method = UnquantizedLinearMethod()
        float8 = made["float8"].weight.to(torch.float8_e4m3fn)
        made["float8"].weight = torch.nn.Parameter(float8, requires_grad=False)
        made["scaled"].quant_method = CompressedTensorsLinearMethod(None)
        heads = {"own": language.lm_head, **made}
        return {name: _find(model, language, head) for name, head in heads.items()}


def _find(model: Any, language: Any, head: Any) -> str:
    language.lm_head = head
    try:
        return type(find_head(model).quant_method).__name__
    except CascacheError as error:
        return f"{type(error).__name__}: {error}"
