"""`python -m common.doctor.prompts`: the data as the teacher's template and image processor see it.

    data       how many samples and images; how many of a few dozen cannot be used
    template   three samples rendered and tokenised: where the response starts and ends
    images     processor class and back end; positions per image at the data's real sizes

Loads the processor, never the model.
"""

import hashlib
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from common.chat import ImageInput, Prompt, to_prompt
from common.data.open import open_source
from common.data.source import SampleSource
from common.doctor.check import CHECKS, Check, Finding
from common.doctor.config import DoctorConfig
from common.doctor.reporter import Reporter, run_part
from common.errors import CascacheError, DataError
from common.images import decode_image, image_bytes
from common.models import resolve_model
from common.processor import load_processor
from schemas.sample import ImageRef, Sample, Span

_TRIED: Final = 48
_SHOWN_SAMPLES: Final = 3
_CONTEXT_TOKENS: Final = 8
_MANY_BAD: Final = 0.05
"""Share of unusable samples above which a dump stops (`--max-quarantine`)."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Samples that were prepared, and why others could not be."""

    prompts: list[tuple[Prompt, list[ImageInput]]]
    """The usable ones with their images."""
    reasons: Counter[str]
    """Unusable ones by reason."""
    first: str
    """Message of the first unusable sample."""
    template: list[str]
    """Messages of samples that the template made unusable."""

    @property
    def count(self) -> int:
        """Samples tried."""
        return len(self.prompts) + self.reasons.total()


def check_prompts(config: DoctorConfig, reporter: Reporter) -> None:
    """Make the checks of this part.

    Raises:
        CascacheError: The data or the processor cannot be opened.
    """
    reporter.progress(f"opening {config.data}")
    source = open_source(config.data, image_root=config.image_root)
    if not len(source):
        raise DataError(f"{config.data} holds no samples; give a file with some", reason="empty")
    ref = resolve_model(config.model)
    reporter.progress(f"loading the processor of {ref.name}")
    try:
        processor = load_processor(ref.path_or_id, revision=ref.revision, options=config)
    except CascacheError:
        reporter.check(check_data(source, Tried([], Counter(), "", [])))  # the data is not at fault
        raise
    tried = try_samples(processor, source)
    reporter.check(check_data(source, tried))
    reporter.check(check_template(processor, tried))
    reporter.check(check_images(processor, tried, max_len=config.max_len))


def try_samples(processor: Any, source: SampleSource) -> Tried:
    """Prepare evenly spaced samples of a source as a dump does, but for its limit of length."""
    tried = Tried([], Counter(), "", [])
    first = ""
    for place in np.unique(np.linspace(0, len(source) - 1, min(_TRIED, len(source))).astype(int)):
        try:
            sample = source[int(place)]
            images = [_input(ref, source.image_root, sample) for ref in sample.images]
            tried.prompts.append((to_prompt(processor, sample, images), images))
        except DataError as error:
            tried.reasons[error.reason] += 1
            first = first or str(error)
            if error.reason == "template":
                tried.template.append(str(error))
    return Tried(tried.prompts, tried.reasons, first, tried.template)


def _input(ref: ImageRef, root: str | None, sample: Sample) -> ImageInput:
    encoded = image_bytes(ref, root)
    pixels = decode_image(encoded, where=sample.sample_id)
    return ImageInput(hashlib.sha256(encoded).hexdigest(), pixels.height, pixels.width)


def check_data(source: SampleSource, tried: Tried) -> Check:
    """How many samples there are, and which share of a few cannot be used."""
    keys = np.asarray(source.image_keys())
    images = len(np.unique(keys[keys != 0]))
    bad = tried.reasons.total()
    said = f"{len(source):,} samples, {images:,} distinct images; {bad} of {tried.count} tried cannot be used"
    values = {
        "samples": len(source),
        "images": images,
        "tried": tried.count,
        "unusable_by_reason": dict(tried.reasons),
    }
    wanted = f"at most {_MANY_BAD:.0%} unusable"
    if not bad:
        return Finding("data", said, wanted, values).passes()
    counted = ", ".join(f"{count} × {reason}" for reason, count in tried.reasons.items())
    finding = Finding("data", f"{said} ({counted})", wanted, values)
    cure = f"the first: {tried.first}"
    return finding.fails(cure) if bad > _MANY_BAD * tried.count else finding.warns(cure)


def check_template(processor: Any, tried: Tried) -> Check:
    """Whether responses are located, with the text around one of them."""
    wanted = f"every response located in {_SHOWN_SAMPLES} samples"
    if tried.template:
        said = f"{len(tried.template)} of {tried.count} samples: {tried.template[0]}"
        return Finding("template", said, wanted).fails(
            "give a template that shows every answer verbatim (--chat-template FILE)"
        )
    shown = [prompt for prompt, _ in tried.prompts[:_SHOWN_SAMPLES]]
    if not shown:
        return Check("template", "skip", f"no usable sample to render: {tried.first}", wanted)
    tokenizer = processor.tokenizer
    around = [response_text(tokenizer, prompt) for prompt in shown]
    ends = {int(prompt.token_ids[span.stop - 1]) for prompt in shown for span in _responses(prompt)}
    values = {
        "around_response": around,
        "end_tokens": sorted(tokenizer.convert_ids_to_tokens(list(ends))),
        "responses": [len(_responses(prompt)) for prompt in shown],
    }
    count = sum(values["responses"])
    return Check("template", "pass", f"{count} responses located, as in {around[0]}", wanted, values=values)


def _responses(prompt: Prompt) -> list[Span]:
    return [span for span in prompt.spans if span.kind == "response"]


def response_text(tokenizer: Any, prompt: Prompt) -> str:
    """A few tokens around the first response, which is in double angle brackets; white space escaped."""
    start, stop = _responses(prompt)[0].start, _responses(prompt)[0].stop
    few = _CONTEXT_TOKENS

    def text(first: int, last: int) -> str:
        ids = prompt.token_ids[max(0, first) : last].tolist()
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole = stop - start <= 3 * few
    middle = text(start, stop) if whole else f"{text(start, start + few)} … {text(stop - few, stop)}"
    shown = f"{text(start - few, start)}⟪{middle}⟫{text(stop, stop + few)}"
    return shown.replace("\n", "\\n").replace("\t", "\\t")


def check_images(processor: Any, tried: Tried, *, max_len: int) -> Check:
    """Which image processor runs, and what it makes of the data's images."""
    images = processor.image_processor
    backend = backend_of(images)
    lengths = [len(prompt.token_ids) for prompt, _ in tried.prompts]
    taken = [each.stop - each.start for prompt, _ in tried.prompts for each in prompt.images]
    sizes = [(each.width, each.height) for _, inputs in tried.prompts for each in inputs]
    values = {
        "processor": type(processor).__name__,
        "image_processor": type(images).__name__,
        "backend": backend,
        "positions_per_image": _spread(taken),
        "positions_per_sample": _spread(lengths),
        "largest_image": max(sizes, key=lambda each: each[0] * each[1], default=None),
    }
    said = f"{type(images).__name__} ({backend})"
    if not taken:
        return Finding("images", f"{said}; the samples tried have no images", "", values).passes()
    said += f"; {_range(taken)} positions per image of {_sizes(sizes)} pixels, {_range(lengths)} per sample"
    wanted = f"samples of at most {max_len:,} positions"
    long = sum(length > max_len for length in lengths)
    finding = Finding("images", said, wanted, values)
    if not long:
        return finding.passes()
    cure = f"{long} of {len(lengths)} samples are longer: raise --max-len, or shrink the images"
    return finding.fails(cure) if long > _MANY_BAD * len(lengths) else finding.warns(cure)


def backend_of(image_processor: Any) -> str:
    """`torchvision` or `PIL`: the two resize with slightly different pixels."""
    named = getattr(image_processor, "backend", None)
    if isinstance(named, str):
        return named
    names = [each.__name__ for each in type(image_processor).__mro__]
    return "torchvision" if any("Fast" in name or "Torchvision" in name for name in names) else "PIL"


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    low = min(sizes, key=lambda each: each[0] * each[1])
    high = max(sizes, key=lambda each: each[0] * each[1])
    return f"{low[0]} × {low[1]}" + ("" if low == high else f" to {high[0]} × {high[1]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the part; returns its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_part(CHECKS["prompts"], check_prompts, arguments, prog="python -m common.doctor.prompts")


if __name__ == "__main__":
    raise SystemExit(main())
