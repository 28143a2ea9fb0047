"""What the capture costs beside a plain prefill, and what an image shared by several questions saves.

    prefill       vLLM computes the samples, nothing is kept
    head          the head's matmul alone, on the rows that the capture keeps
    capture       top-k, logsumexp, tail of those rows
    factor        capture and the relation's factor of every image
    dict, flat, quick     vLLM's prompt_logprobs: as dictionaries, flat, flat without detokenizing
    transformers  a plain forward pass in float32

Then the capture alone, held to transformers, over both of vLLM's model runners and over two workers
that share each layer (TP) or take half of the layers each (PP).

All in one process and thread, interleaved, medians of CPU seconds, on the shipped tiny teacher with its
own vocabulary and with one padded to 151,936 rows, all of them taken for real. Each vocabulary runs in a
process of its own, so that peak memory is its own.

    python -m scripts.bench_teacher            # build/bench/teacher.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from common.cache.writer import CacheWriter
from common.data.open import open_source
from common.data.shapes import write_shapes
from common.fingerprint import fingerprints
from common.models import resolve_model
from common.processor import load_processor
from common.spans import positions_of, response_rows
from schemas.manifest import Capture, Manifest, Relation, SampleSet, TeacherIdentity
from schemas.sample import Sample
from scripts.bench_models import resized_teacher
from teacher_dump.engine import Engine, EngineSettings, Submission
from teacher_dump.prompts import Prepared, Preparer
from teacher_dump.records import PartCapture, split
from teacher_dump.request import CaptureSettings

BIG = 151_936
TOPK = 64
LARGE_IMAGE = 192
MAX_LEN = 1000
TRITON = Path(sys.prefix) / "triton"
Result = dict[str, Any]


class Way(NamedTuple):
    """How an engine is spread."""

    runner: str
    """vLLM's model runner."""
    tensor: int
    """Workers that share each layer."""
    pipeline: int
    """Workers that share the layers."""


WAYS = {
    f"{runner} TP={tensor} PP={pipeline}": Way(runner, tensor, pipeline)
    for runner in ("V1", "V2")
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2))
}


def main() -> None:
    """Run every vocabulary in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/teacher.json"))
    parser.add_argument("--images", type=int, default=6, help="images, two samples each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=[*PARTS, *WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        way = WAYS.get(options.part)
        print(json.dumps(exactness(way) if way else PARTS[options.part](options.images, options.rounds)))
        return
    results: Result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for part in PARTS:
        results |= {part: _in_process(part, options)}
        print(part, json.dumps(results[part], indent=1), flush=True)
    results["runners"] = {}
    for name, way in WAYS.items():
        if way.runner == "V2" and not (TRITON / "sitecustomize.py").exists():
            print(f"{name}: left out, there is no Triton in {TRITON}; scripts/setup.sh puts it", flush=True)
            continue
        results["runners"] |= {name: _in_process(name, options, TRITON if way.runner == "V2" else None)}
        print(name, json.dumps(results["runners"][name]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(_headline(results) | results, indent=1) + "\n")
    print(json.dumps(_headline(results), indent=1))


def _headline(results: Result) -> Result:
    """The numbers that are promised, at the large vocabulary."""
    names = ("capture_over_floor", "prompt_logprobs_over_capture", "encode_and_write_share", "peak_rss_bytes")
    headline = {name: results["big"][name] for name in names}
    held = [results["small"], results["big"], *results["runners"].values()]
    headline["max_logit_error"] = max(each["max_logit_error"] for each in held)
    headline["set_mismatches"] = sum(each["set_mismatches"] for each in held)
    return headline | {"prefix_cache_speedup": results["shared"]["speedup"]}


def _in_process(part: str, options: argparse.Namespace, beside: Path | None = None) -> Result:
    command = [sys.executable, "-m", "scripts.bench_teacher", "--part", part]
    command += ["--images", str(options.images), "--rounds", str(options.rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if beside is not None:
        environment |= {"PYTHONPATH": str(beside), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: Result = json.loads(done.stdout.splitlines()[-1])
    return answer


def settings_for(model: Path, vocab_size: int, **more: Any) -> EngineSettings:
    """In this process, float32, K = 64 everywhere, no factor."""
    capture = CaptureSettings(topk=TOPK, visual_topk=TOPK, vocab_size=vocab_size, store="none")
    return EngineSettings(str(model), None, "float32", MAX_LEN, capture, inside=True, max_num_seqs=16, **more)


def captured_manifest(processor: Any, *, vocab: int, samples: int, width: int) -> Manifest:
    """Enough of an identity to seal a part."""
    return Manifest(
        teacher=TeacherIdentity(model="bench", weights_sha256="0" * 64, model_type="llava", dtype="float32"),
        fingerprints=fingerprints(processor),
        vocab_rows=vocab,
        vocab_size=vocab,
        hidden_size=width,
        samples=SampleSet(fingerprint="0" * 64, num_samples=samples),
        capture=Capture(topk=TOPK, visual_topk=TOPK),
        relation=Relation(store="factor"),
        part_samples=samples,
    )


def prepare_all(directory: Path, model: Path, images: int) -> tuple[Any, list[Prepared]]:
    """The processor, and two samples an image."""
    processor = load_processor(str(model))
    source = open_source(str(write_shapes(directory, num_images=images, seed=3)))
    preparer = Preparer(source, processor, max_len=MAX_LEN)
    found = [preparer(index) for index in range(len(source))]
    return processor, [each for each in found if isinstance(each, Prepared)]


def compare_at(vocab: int | None) -> Callable[[int, int], Result]:
    """The measurement at a vocabulary; None is the teacher's own."""

    def measure(images: int, rounds: int) -> Result:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as place:
            model = Path(resolve_model("tiny").path_or_id)
            if vocab is not None:
                model = resized_teacher(model, Path(place) / "model", vocab=vocab)
            return _compare(Path(place), model, images, rounds)

    return measure


def _compare(place: Path, model: Path, images: int, rounds: int) -> Result:
    from transformers import AutoModelForImageTextToText

    processor, items = prepare_all(place / "data", model, images)
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    weight = reference.get_output_embeddings().weight.detach()
    manifest = captured_manifest(processor, vocab=len(weight), samples=len(items), width=weight.shape[1])
    settings = settings_for(model, len(weight), arguments={"max_logprobs": TOPK})
    with Engine(settings) as engine:
        runs = Runs(engine, items, reference, processor, manifest)
        seconds = interleave(runs.modes(), rounds)
        error, mismatches = runs.compare(weight)
    writing = cpu_seconds(lambda: runs.write(place / "cache"))
    kept = seconds["factor"]
    return {
        "vocabulary": len(weight),
        "samples": len(items),
        "rows": runs.num_rows,
        "positions": sum(len(item.prompt.token_ids) for item in items),
        "seconds": seconds,
        "capture_over_floor": seconds["capture"] / (seconds["prefill"] + seconds["head"]),
        "prompt_logprobs_over_capture": seconds["quick"] / seconds["capture"],
        "encode_and_write_share": writing / (writing + kept),
        "max_logit_error": error,
        "set_mismatches": mismatches,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


class Runs:
    """One function per row of the table, all on the same samples."""

    def __init__(
        self, engine: Engine, items: list[Prepared], reference: Any, processor: Any, manifest: Manifest
    ) -> None:
        self.engine, self.items, self.reference = engine, items, reference
        self.processor, self.manifest = processor, manifest
        self.weight = reference.get_output_embeddings().weight.detach()
        part = PartCapture(engine, manifest.capture, wave=len(items))
        self.submissions: list[Submission] = part._submissions(items)
        self.num_rows = sum(
            len(each.request.response_rows)
            + sum(len(rows) for rows in each.request.visual_rows if rows is not None)
            for each in self.submissions
        )
        self.hidden = torch.randn(self.num_rows, self.weight.shape[1])
        self.results: list[Any] = []

    def modes(self) -> dict[str, Callable[[], None]]:
        """The rows of the table."""
        return {
            "prefill": lambda: self.plain(),
            "head": self.head,
            "capture": lambda: self.capture("none"),
            "factor": lambda: self.capture("factor"),
            "dict": lambda: self.plain(prompt_logprobs=TOPK, detokenize=True),
            "flat": lambda: self.plain(prompt_logprobs=TOPK, flat_logprobs=True, detokenize=True),
            "quick": lambda: self.plain(prompt_logprobs=TOPK, flat_logprobs=True),
            "transformers": self.forward,
        }

    def plain(self, **options: Any) -> None:
        """Through vLLM, without the capture."""
        from vllm import SamplingParams

        params = SamplingParams(**{"max_tokens": 1, "temperature": 0.0, "detokenize": False, **options})
        prompts = [
            {
                "prompt_token_ids": each.prompt.prompt_ids.tolist(),
                "multi_modal_data": {"image": list(each.pixels)},
                "multi_modal_uuids": {"image": [image.identifier for image in each.request.images]},
            }
            for each in self.submissions
        ]
        self.engine._llm.generate(prompts, params, use_tqdm=False)

    @torch.inference_mode()
    def head(self) -> None:
        """The matmul, in the capture's chunks."""
        size = self.engine.settings.capture.chunk_rows
        for start in range(0, self.num_rows, size):
            functional.linear(self.hidden[start : start + size], self.weight)

    def capture(self, store: str) -> None:
        """As the dump does it."""
        kept = self.engine._llm.llm_engine.model_executor.driver_worker.worker._cascache
        kept.settings = replace(kept.settings, store=store)
        if store == "factor" and kept.gram is None:
            with torch.inference_mode():
                kept.gram = self.weight.T @ self.weight
        results = self.engine.run(self.submissions)
        if store == "factor":
            self.results = results

    @torch.inference_mode()
    def logits(self, item: Prepared) -> torch.Tensor:
        """[T, V] of transformers."""
        text = self.processor.tokenizer.decode(item.prompt.prompt_ids)
        inputs = self.processor(
            text=text, images=list(item.pixels), return_tensors="pt", add_special_tokens=False
        )
        assert inputs["input_ids"][0].tolist() == item.prompt.token_ids.tolist()
        output: torch.Tensor = self.reference(**inputs).logits[0]
        return output

    def forward(self) -> None:
        """Sample by sample through transformers."""
        for item in self.items:
            self.logits(item)

    def compare(self, weight: torch.Tensor) -> tuple[float, int]:
        """Largest |Δlogit| over all kept ids, and rows whose kept set differs."""
        error, mismatches = 0.0, 0
        for item, found in zip(self.items, self.results, strict=True):
            assert found.problem is None, found.problem
            logits = self.logits(item)
            tables = [(response_rows(item.prompt.spans), found.response)]
            if found.images:
                tables.append((positions_of(item.prompt.spans, "image"), found.images[0].rows))
            for rows, kept in tables:
                best = logits[rows].topk(TOPK, dim=-1)
                raw = kept.logprobs + kept.logsumexp[:, :1]
                error = max(error, float(np.abs(raw - best.values.numpy()).max()))
                same = np.sort(kept.token_ids, -1) == np.sort(best.indices.numpy(), -1)
                mismatches += int((~same.all(-1)).sum())
        return error, mismatches

    def write(self, directory: Path) -> None:
        """Encode, compress and seal what the last capture kept."""
        part = PartCapture(self.engine, self.manifest.capture, wave=len(self.items))
        for item, found in zip(self.items, self.results, strict=True):
            part._learn(item, found)
        records = [part._record(item, found) for item, found in zip(self.items, self.results, strict=True)]
        writer = CacheWriter.open(str(directory), self.manifest)
        writer.write_part(0, records, first_sample=0, num_samples=len(records))


def exactness(way: Way) -> Result:
    """The capture of four samples held to transformers."""
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tiny = Path(resolve_model("tiny").path_or_id)
        model = resized_teacher(tiny, Path(place) / "model", tower_heads=2)  # which two workers can share
        processor, items = prepare_all(Path(place) / "data", model, images=2)
        reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        weight = reference.get_output_embeddings().weight.detach()
        manifest = captured_manifest(processor, vocab=len(weight), samples=len(items), width=weight.shape[1])
        settings = replace(
            settings_for(model, len(weight), tensor_parallel=way.tensor, pipeline_parallel=way.pipeline),
            inside=way.tensor * way.pipeline == 1,
        )
        with Engine(settings) as engine:
            assert engine.runner == way.runner, engine.runner
            runs = Runs(engine, items, reference, processor, manifest)
            runs.results = engine.run(runs.submissions)
        error, mismatches = runs.compare(weight)
    return {"rows": runs.num_rows, "max_logit_error": error, "set_mismatches": mismatches}


def shared(images: int, rounds: int) -> Result:
    """Samples a second with and without the prefix cache, 576 positions an image."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model = resized_teacher(
            Path(resolve_model("tiny").path_or_id), Path(place) / "model", side=LARGE_IMAGE
        )
        processor, items = prepare_all(Path(place) / "data", model, images)
        size = len(processor.tokenizer)
        asked = {count: _questions(processor, items, count) for count in (1, 3, 10)}
        seconds: dict[str, dict[str, float]] = {}
        for name, cached in (("without", False), ("with", True)):
            with Engine(
                settings_for(model, size, prefix_cache=cached, arguments={"block_size": 32})
            ) as engine:
                part = PartCapture(engine, Capture(topk=TOPK, visual_topk=TOPK), wave=16)
                modes = {str(count): _running(part, asked[count]) for count in asked}
                seconds[name] = interleave(modes, rounds)
        return {
            "images": images,
            "positions_an_image": (LARGE_IMAGE // 8) ** 2,
            "seconds": seconds,
            "speedup": {
                count: seconds["without"][count] / seconds["with"][count] for count in seconds["with"]
            },
        }


def _running(part: PartCapture, items: list[Prepared]) -> Callable[[], None]:
    def run() -> None:
        result = split(each for done in part.run(items) for each in done)
        assert not result.quarantined, result.quarantined[0]

    return run


def _questions(processor: Any, items: list[Prepared], count: int) -> list[Prepared]:
    """`count` one-line questions on each image."""
    from common.chat import ImageInput, to_prompt
    from schemas.sample import ImageRef, Turn

    found = []
    for item in {item.identities: item for item in items if item.pixels}.values():
        image = item.pixels[0]
        for number in range(count):
            question = f"how many of the {number} objects are red ?"
            turns = (Turn(role="user", parts=(0, question)), Turn(role="assistant", parts=("three",)))
            name = f"{item.sample_id}-{number}"
            sample = Sample(sample_id=name, images=(ImageRef(path="x"),), turns=turns)
            inputs = [ImageInput(item.prompt.images[0].sha256, image.height, image.width)]
            prompt = to_prompt(processor, sample, inputs)
            found.append(Prepared(name, None, prompt, item.pixels, item.identities))
    return found


def interleave(modes: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each mode, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in modes}
    for number in range(rounds + 1):
        for name, run in modes.items():
            seconds = cpu_seconds(run)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(each) for name, each in taken.items()}


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU seconds of one call, all threads together."""
    start = time.process_time()
    run()
    return time.process_time() - start


PARTS: dict[str, Callable[[int, int], Result]] = {
    "small": compare_at(None),
    "big": compare_at(BIG),
    "shared": shared,
}


if __name__ == "__main__":
    main()
