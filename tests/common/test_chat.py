"""Prompts equal what the processor itself makes, in six families; every position is accounted for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.chat import ImageInput, to_prompt, to_question
from common.errors import ConfigError, DataError
from common.grids import image_layout
from common.messages import to_messages
from common.processor import load_processor
from common.render import render
from schemas.sample import ImageRef, Sample, Turn
from tests import tiny_families

SHA = "ab" * 32
SIZES = [(48, 48), (56, 56), (100, 60), (40, 200), (123, 77), (300, 90), (60, 61)]
TALK = (
    ("user", (0, "what is this?")),
    ("assistant", ("a red dog.",)),
    ("user", ("and?",)),
    ("assistant", ("two",)),
)


def sample(*turns: tuple[str, tuple[str | int, ...]], images: int = 1) -> Sample:
    refs = tuple(ImageRef(data=b"x") for _ in range(images))
    return Sample(
        sample_id="s", images=refs, turns=tuple(Turn(role=role, parts=parts) for role, parts in turns)
    )  # type: ignore[arg-type]


def inputs(*sizes: tuple[int, int]) -> list[ImageInput]:
    return [ImageInput(SHA, height, width) for height, width in sizes]


@pytest.fixture(scope="module")
def processor(tiny_family: Callable[[str], Path]) -> Callable[[str], Any]:
    known: dict[str, Any] = {}
    return lambda family: known.setdefault(family, load_processor(str(tiny_family(family))))


@pytest.fixture(scope="module")
def llava(processor: Callable[[str], Any]) -> Any:
    return processor("llava_siglip")


def decoded(processor: Any, prompt: Any, kind: str) -> list[str]:
    return [
        processor.tokenizer.decode(prompt.token_ids[s.start : s.stop]) for s in prompt.spans if s.kind == kind
    ]


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_expansion_equals_the_processor(family: str, size: tuple[int, int], processor: Callable[[str], Any]):
    model = processor(family)
    example = sample(*TALK)
    prompt = to_prompt(model, example, inputs(size))
    whole = model(text=render(model, example).text, images=[Image.new("RGB", size[::-1])])
    assert np.asarray(whole["input_ids"]).reshape(-1).tolist() == prompt.token_ids.tolist()


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_several_images_expand_as_a_flat_list_does(family: str, processor: Callable[[str], Any]):
    model = processor(family)
    example = sample(("user", (0, "and", 1, "?")), ("assistant", ("two",)), images=2)
    prompt = to_prompt(model, example, inputs((100, 60), (40, 90)))
    pictures = [Image.new("RGB", (60, 100)), Image.new("RGB", (90, 40))]
    whole = model(text=render(model, example).text, images=pictures)
    assert np.asarray(whole["input_ids"]).reshape(-1).tolist() == prompt.token_ids.tolist()
    assert [span.kind for span in prompt.spans].count("image") == 2


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_lie_inside_the_span_without_overlap(
    family: str, size: tuple[int, int], processor: Callable[[str], Any]
):
    layout = image_layout(processor(family), *size)
    taken = [
        tile.offset + row * tile.stride + column
        for tile in layout.tiles
        for row in range(tile.rows)
        for column in range(tile.columns)
    ]
    assert len(set(taken)) == len(taken)
    assert max(taken) < layout.num_positions
    newlines = sum(tile.rows for tile in layout.tiles if tile.stride > tile.columns)
    if family == "internvl" and layout.num_positions > len(taken):
        assert max(taken) + 1 == layout.num_positions, "the whole image comes last, after its crops"
        assert layout.num_positions % len(taken) == 0
    else:
        assert len(taken) + newlines == layout.num_positions


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_responses_end_with_the_end_of_turn_and_not_after(family: str, processor: Callable[[str], Any]):
    prompt = to_prompt(processor(family), sample(*TALK), inputs((56, 56)))
    assert decoded(processor(family), prompt, "response") == ["a red dog.<|im_end|>", "two<|im_end|>"]


def test_spans_cover_the_sequence_in_order(llava: Any):
    prompt = to_prompt(llava, sample(*TALK), inputs((56, 56)))
    assert [span.start for span in prompt.spans] == [0, *(span.stop for span in prompt.spans[:-1])]
    assert prompt.spans[-1].stop == len(prompt.token_ids)
    image = prompt.images[0]
    assert set(prompt.token_ids[image.start : image.stop].tolist()) == {llava.image_token_id}


def test_text_only(llava: Any):
    prompt = to_prompt(
        llava, sample(("system", ("be brief",)), ("user", ("hi",)), ("assistant", ("two",)), images=0), []
    )
    assert prompt.images == ()
    assert prompt.prompt_ids.tolist() == prompt.token_ids.tolist()
    assert decoded(llava, prompt, "response") == ["two<|im_end|>"]


def test_a_question_is_the_prompt_up_to_its_answer(llava: Any):
    whole = to_prompt(llava, sample(*TALK), inputs((56, 56)))
    question = to_question(llava, sample(*TALK), inputs((56, 56)))
    last = [span for span in whole.spans if span.kind == "response"][-1]
    assert question.token_ids.tolist() == whole.token_ids[: last.start].tolist()
    assert all(span.kind != "response" for span in question.spans)


def test_equal_prefixes_have_equal_keys(llava: Any):
    def key(first: str, answer: str, sha: str = SHA) -> str:
        example = sample(("user", (first, 0, "what?")), ("assistant", (answer,)))
        return to_prompt(llava, example, [ImageInput(sha, 56, 56)]).images[0].key

    assert key("look ", "red") == key("look ", "blue and green")
    assert key("look ", "red") != key("see ", "red")
    assert key("look ", "red") != key("look ", "red", "cd" * 32)
    assert len(key("look ", "red")) == 32


BAD = [
    ([("user", ("hi",)), ("assistant", ("two",))], 1, "image-marks"),
    ([("user", (0, "hi")), ("assistant", ("two",))], 0, "image-marks"),
    ([("user", (0, 0, "hi")), ("assistant", ("two",))], 1, "image-marks"),
    ([("user", (1, 0, "hi")), ("assistant", ("two",))], 2, "image-marks"),
    ([("user", (0, "hi <image>")), ("assistant", ("two",))], 1, "image-marks"),
    ([("user", (0, "hi")), ("assistant", ("<image>",))], 1, "image-marks"),
    ([("user", (0, "hi")), ("assistant", (" \n",))], 1, "empty-response"),
    ([("user", (0, "hi"))], 1, "empty-response"),
]


@pytest.mark.parametrize(("turns", "images", "reason"), BAD)
def test_bad_samples_are_refused_with_a_reason(turns: Any, images: int, reason: str, llava: Any):
    with pytest.raises(DataError, match=r"^s: ") as caught:
        to_prompt(llava, sample(*turns, images=images), inputs(*[(56, 56)] * images))
    assert caught.value.reason == reason


def test_too_long_is_refused_with_both_lengths(llava: Any):
    length = len(to_prompt(llava, sample(*TALK), inputs((56, 56))).token_ids)
    assert to_prompt(llava, sample(*TALK), inputs((56, 56)), max_len=length)
    with pytest.raises(DataError, match=f"{length} positions, --max-len is {length - 1}") as caught:
        to_prompt(llava, sample(*TALK), inputs((56, 56)), max_len=length - 1)
    assert caught.value.reason == "too-long"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content[-1].text }}"
        "{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text | upper }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_hide_responses_are_refused(
    template: str, llava: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llava, "chat_template", template)
    with pytest.raises(DataError) as caught:
        to_prompt(llava, sample(("user", ("hi",)), *TALK[1:], images=0), [])
    assert caught.value.reason == "template"


def test_a_template_with_a_space_before_the_answer(llava: Any, monkeypatch: pytest.MonkeyPatch):
    """As LLaVA-1.5's: the response starts with the generation prompt's missing space, and has no end."""
    template = (
        "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    monkeypatch.setattr(llava, "chat_template", template)
    prompt = to_prompt(llava, sample(*TALK), inputs((56, 56)))
    end = llava.tokenizer.eos_token
    assert decoded(llava, prompt, "response") == [f" a red dog.{end}", f" two{end}"]


def test_bos_comes_once(llava: Any, monkeypatch: pytest.MonkeyPatch):
    from tokenizers.processors import TemplateProcessing

    tokenizer = llava.tokenizer
    before = tokenizer.backend_tokenizer.post_processor
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    adds = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    tokenizer.backend_tokenizer.post_processor = adds
    try:
        added = to_prompt(llava, sample(*TALK), inputs((56, 56)))
        monkeypatch.setattr(llava, "chat_template", "{{ bos_token }}" + llava.chat_template)
        rendered = to_prompt(llava, sample(*TALK), inputs((56, 56)))
    finally:
        tokenizer.backend_tokenizer.post_processor = before
        tokenizer.bos_token = None
    for prompt in (added, rendered):
        assert prompt.token_ids[0] == bos
        assert int((prompt.token_ids == bos).sum()) == 1
        assert decoded(llava, prompt, "response") == ["a red dog.<|im_end|>", "two<|im_end|>"]


def test_messages_name_text_and_images():
    assert to_messages(sample(("user", (0, "hi"))))[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "hi"}],
    }


def test_a_directory_without_a_processor_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_processor(str(tmp_path))
