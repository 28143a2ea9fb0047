"""The audit's twin: states and head apart give the model's own logits, in the head's dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.processor import load_processor
from teacher_dump.reference import Reference
from tests.teacher_dump.examples import prepare, samples


def whole_logits(path: Path, processor: Any, item: Any, dtype: torch.dtype) -> torch.Tensor:
    """[T, V] of the model called as one, on inputs that its processor makes from text."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()
    text = processor.tokenizer.decode(item.prompt.prompt_ids)
    inputs = processor(text=text, images=list(item.pixels) or None, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[0].float()


@pytest.mark.parametrize("family", ["llava_siglip", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_states_and_head_apart_give_the_model_s_own_logits(family: str, tiny_family: Any):
    path = tiny_family(family)
    processor = load_processor(str(path))
    size = len(processor.tokenizer)
    reference = Reference(path, processor, vocab_size=size)
    for example in (samples()[0], samples()[-2], samples()[-1]):
        item = prepare(processor, example)
        states = reference.states(item.prompt.token_ids, item.pixels)
        expected = whole_logits(path, processor, item, torch.float32)
        assert (reference.logits(states) - expected[:, :size]).abs().max() <= 1e-5
        rows = torch.tensor([3, 1])
        assert (reference.logits(states)[rows] - reference.logits(states[rows])).abs().max() <= 1e-5


def test_a_bfloat16_teacher_is_taken_as_its_level_has_it(tiny_family: Any):
    """Weights and states in bfloat16; the head in float32 of those, or rounded as the model itself does."""
    path = tiny_family("llava_siglip")
    processor = load_processor(str(path))
    item, size = prepare(processor, samples()[0]), len(processor.tokenizer)
    own = whole_logits(path, processor, item, torch.bfloat16)[:, :size]
    found = {}
    for head in ("float32", "bfloat16"):
        reference = Reference(path, processor, vocab_size=size, dtype="bfloat16", head_dtype=head)
        states = reference.states(item.prompt.token_ids, item.pixels)
        assert states.dtype == torch.bfloat16
        found[head] = reference.logits(states)
    assert torch.equal(found["bfloat16"].bfloat16().float(), found["bfloat16"])
    assert (found["bfloat16"] - own).abs().max() <= 0.125, "one step in [16, 32)"
    error = (found["float32"] - found["bfloat16"]).abs().max()
    assert 0.01 <= error <= 0.0625 + 1e-3, "half a step"
