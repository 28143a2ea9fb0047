"""Every published shape of chat template: the response is the answer and its end of turn, exactly once."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from common.chat import ImageInput, Prompt, answered_prompt, to_dialogue, to_prompt, to_question
from common.errors import DataError
from common.processor import load_processor
from common.render import render, render_question
from schemas.sample import ImageRef, Sample, Turn
from tests.templates import (
    CHANGING,
    HEADERS,
    TEMPLATES,
    THINK_BLOCK,
    add_special_tokens,
    end_of_turn,
    fit,
)

QUESTIONS = ("is it a red dog, or two?", "what is a red dog?", "two or a red dog. and more?")
ANSWERS = ("a red dog.", "two", "a red dog.")
INPUT = ImageInput("ab" * 32, 56, 56)


@pytest.fixture(scope="module")
def processor(tiny_family: Callable[[str], Path]) -> Any:
    """One processor; tests set the template."""
    found = load_processor(str(tiny_family("llava_siglip")))
    add_special_tokens(found)
    return found


@pytest.fixture
def using(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The processor with a template, by name or as text."""

    def use(template: str) -> Any:
        known = template in TEMPLATES | CHANGING
        monkeypatch.setattr(processor, "chat_template", fit(template, "<image>") if known else template)
        return processor

    return use


def talk(turns: int, images: int, *, system: bool = False) -> Sample:
    """Questions and answers that occur in each other; the images are in the first question."""
    said = [Turn(role="system", parts=("be brief.",))] if system else []
    for turn in range(turns):
        marks = range(images) if turn == 0 else ()
        said.append(Turn(role="user", parts=(*marks, QUESTIONS[turn])))
        said.append(Turn(role="assistant", parts=(ANSWERS[turn],)))
    return Sample(sample_id="s", images=(ImageRef(data=b"x"),) * images, turns=tuple(said))


def answers(*texts: str, first: str = "user") -> Sample:
    """Turns without images that alternate between speakers."""
    other = "assistant" if first == "user" else "user"
    turns = [Turn(role=(first, other)[place % 2], parts=(text,)) for place, text in enumerate(texts)]
    return Sample(sample_id="s", turns=tuple(turns))


def prompt_of(processor: Any, sample: Sample) -> Prompt:
    return to_prompt(processor, sample, [INPUT] * len(sample.images))


def spans(prompt: Prompt, kind: str = "response") -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in prompt.spans if span.kind == kind]


def shown(processor: Any, prompt: Prompt) -> list[str]:
    return [processor.tokenizer.decode(prompt.token_ids[start:stop]) for start, stop in spans(prompt)]


def brute_force(processor: Any, prompt: Prompt, name: str, answer: str) -> list[tuple[int, int]]:
    """Every range of tokens that reads as the answer with its end, behind what heads an answer."""
    pieces = [processor.tokenizer.decode([token]) for token in prompt.token_ids.tolist()]
    wanted = answer + end_of_turn(name, processor.tokenizer.eos_token)
    heads = (HEADERS[name], HEADERS[name] + THINK_BLOCK)
    found = []
    for start in range(len(pieces)):
        for stop in range(start + 1, len(pieces) + 1):
            text = "".join(pieces[start:stop])
            if len(text) > len(wanted) + 1:
                break
            if text.lstrip(" ") == wanted and "".join(pieces[:start]).endswith(heads):
                found.append((start, stop))
    return found


CASES = [*product(TEMPLATES, (1, 2, 3), (0, 1, 2), (False,)), *product(TEMPLATES, (2,), (1,), (True,))]


@pytest.mark.parametrize(("name", "turns", "images", "system"), CASES)
def test_the_response_is_where_brute_force_finds_it(
    name: str, turns: int, images: int, system: bool, using: Callable[[str], Any]
):
    processor = using(name)
    prompt = prompt_of(processor, talk(turns, images, system=system))
    wanted = sorted(
        {each for answer in ANSWERS[:turns] for each in brute_force(processor, prompt, name, answer)}
    )
    assert spans(prompt) == wanted
    assert len(wanted) == turns
    end = processor.tokenizer.convert_tokens_to_ids(end_of_turn(name, processor.tokenizer.eos_token))
    inside = [prompt.token_ids[start:stop].tolist() for start, stop in wanted]
    assert [each.count(end) for each in inside] == [1] * turns
    assert [each[-1] for each in inside] == [end] * turns
    assert len(spans(prompt, "image")) == images


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_text_is_the_rendering_of_the_whole_conversation(name: str, using: Callable[[str], Any]):
    processor = using(name)
    example = talk(3, 1)
    text = render(processor, example).text
    whole = processor.apply_chat_template(
        [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in turn.parts
                ],
            }
            for turn in example.turns
        ]
    )
    writes_none = name in ("llava15", "llava15_marked", "chatml_no_end")
    assert (text == whole) is not writes_none
    assert text.replace(processor.tokenizer.eos_token, "") == whole.replace(processor.tokenizer.eos_token, "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llava15", "llava15_marked"),
        ("onevision_hub", "onevision_hub_marked"),
        ("qwen3_5_think", "qwen3_5_nothink"),
    ],
)
def test_marks_and_generation_prompts_change_no_response(one: str, other: str, using: Callable[[str], Any]):
    first, second = (prompt_of(using(name), talk(3, 2)) for name in (one, other))
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.spans == second.spans


def test_a_think_block_that_the_template_adds_is_prompt(using: Callable[[str], Any]):
    processor = using("qwen3_5_think")
    text = render(processor, talk(2, 0)).text
    assert text.count(THINK_BLOCK) == 1, "only the last answer has one"
    prompt = prompt_of(processor, talk(2, 0))
    before = processor.tokenizer.decode(prompt.token_ids[: spans(prompt)[-1][0]])
    assert before.endswith(HEADERS["qwen3_5_think"] + THINK_BLOCK)


def test_a_think_block_of_the_data_is_part_of_the_response(using: Callable[[str], Any]):
    processor = using("qwen3_5_think")
    for thought in ("<think>\nit barks\n</think>\n\n", THINK_BLOCK):
        prompt = prompt_of(processor, answers("what?", "a dog", "sure?", f"{thought}yes"))
        assert shown(processor, prompt) == ["a dog<|im_end|>", f"{thought}yes<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "answer",
    [
        "{{ 7 * 7 }} {% raw %} {# no #}",
        "314159265358",
        "3141592653583",
        "<|im_start|>assistant\nno",
        "ASSISTANT: no USER: no",
        "what?",
        "0",
        "<think>",
        "line\nbreak\n\n- and more",
        "“äöü” 你好 🙂",
    ],
)
def test_answers_of_any_text_are_located(name: str, answer: str, using: Callable[[str], Any]):
    processor = using(name)
    example = answers(f"what? {answer}", answer, answer, answer)
    end = end_of_turn(name, processor.tokenizer.eos_token)
    rendered = render(processor, example)
    found = [rendered.text[start:stop].lstrip(" ") for start, stop in rendered.responses]
    assert found == [answer + end] * 2
    assert len(spans(prompt_of(processor, example))) == 2


def test_an_answer_in_several_parts_is_one_response(using: Callable[[str], Any]):
    turns = (Turn(role="user", parts=("what?",)), Turn(role="assistant", parts=("a", "red", "dog")))
    example = Sample(sample_id="s", turns=turns)
    assert shown(using("internvl"), prompt_of(using("internvl"), example)) == ["areddog<|im_end|>"]
    assert shown(using("onevision_hub"), prompt_of(using("onevision_hub"), example)) == [
        "a\nred\ndog<|im_end|>"
    ]


def test_an_answer_that_contains_its_end_of_turn_is_refused(using: Callable[[str], Any]):
    for name, token in (("internvl", "<|im_end|>"), ("llava15", "<|im_end|>"), ("gemma3", "<end_of_turn>")):
        with pytest.raises(DataError, match=r"take it out of the data") as caught:
            prompt_of(using(name), answers("what?", f"two{token}"))
        assert caught.value.reason == "end-of-turn"


CHATML = fit("internvl", "<image>")
REFUSED = {
    "strip": (
        "strip",
        answers("what?", "two", "and?", " three\n"),
        r"turn 3: ... changes the answer: found 'three', wanted ' three\n'; take the white space out",
    ),
    "title": (
        "title",
        answers("what?", "a red dog"),
        "turn 1: ... found 'A Red Dog', wanted 'a red dog'; use a",
    ),
    "escape": (
        CHATML.replace("part.text", "part.text | e"),
        answers("what?", "it is said that a < b"),
        "found 'said that a &lt; b', wanted 'said that a < b'",
    ),
    "drops earlier thoughts": (
        "qwen3_5_think",
        answers("what?", "<think>\nx\n</think>\n\ntwo", "and?", "three"),
        "turn 1: ... found 'two', wanted '<think>",
    ),
    "hides": (
        CHATML.replace("part.text", "part.text[:4]"),
        answers("what?", "a red dog"),
        "leaves the answer 'a red dog' out, or changes it",
    ),
    "repeats": (
        CHATML + "{{ messages[-1].content[0].text }}",
        answers("what?", "a red dog"),
        "'a red dog' 2 t",
    ),
    "counts": (
        "{{ messages[-1].content[0].text | length }}" + CHATML,
        answers("what?", "a red dog"),
        "other things around the answer 'a red dog' ... found '9<|im_start|>",
    ),
    "reverses": (
        CHATML.replace("in messages", "in messages[::-1]"),
        answers("what?", "a red dog", "and?", "two"),
        "writes the turns in another order",
    ),
    "plain strings": (
        CHATML.replace("{% for part in turn.content %}", "{{ turn.content }}{% for part in [] %}"),
        answers("what?", "a red dog"),
        "as a Python list, so it expects plain strings",
    ),
    "adds a list": (
        CHATML.replace("turn.role +", "turn.content +"),
        answers("what?", "two"),
        "fails on the conversation: TypeError",
    ),
    "nothing": ("{% if false %}x{% endif %}", answers("what?", "two"), "renders nothing"),
    "no Jinja": (CHATML + "\n{% if %}", answers("what?", "two"), "is no Jinja template: line 2: Expected an"),
    "raises": (
        "qwen3_5_think",
        answers("two", first="assistant"),
        "refuses ...: a conversation needs a user turn",
    ),
    "order": (
        "gemma3",
        answers("two", "and?", "three", first="assistant"),
        "refuses ...: roles must take turns",
    ),
    "undefined": (
        "{{ messages[0].name.first }}",
        answers("what?", "two"),
        "refuses ... has no attribute 'name'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_located_is_refused_precisely(case: str, using: Callable[[str], Any]):
    template, example, message = REFUSED[case]
    with pytest.raises(DataError, match=r"^s: ") as caught:
        prompt_of(using(template), example)
    assert caught.value.reason == "template"
    assert "\n" not in str(caught.value)
    assert all(piece in str(caught.value) for piece in message.split("..."))


def test_a_template_that_looks_at_the_answers_end_is_located(using: Callable[[str], Any]):
    """It adds a full stop where there is none, which the student has to learn too."""
    stop = "{% if turn.content[-1].text[-1] != '.' %}{{ '.' }}{% endif %}"
    processor = using(CHATML.replace(r"{{ '<|im_end|>", stop + r"{{ '<|im_end|>"))
    assert shown(processor, prompt_of(processor, answers("what?", "a dog."))) == ["a dog.<|im_end|>"]
    assert shown(processor, prompt_of(processor, answers("what?", "a dog"))) == ["a dog.<|im_end|>"]


def test_white_space_before_the_end_of_turn_is_trained(using: Callable[[str], Any]):
    processor = using(CHATML.replace(r"{{ '<|im_end|>\n' }}", r"{{ '\n<|im_end|>\n' }}"))
    wanted = ["two\n<|im_end|>", "three\n<|im_end|>"]
    assert shown(processor, prompt_of(processor, answers("what?", "two", "and?", "three"))) == wanted


def test_an_end_of_turn_is_added_where_it_is_missing_and_nowhere_else(using: Callable[[str], Any]):
    for last in ("loop.last", "not loop.last"):
        end = r"{{ '<|im_end|>\n' if " + last + r" else '\n' }}"
        processor = using(CHATML.replace(r"{{ '<|im_end|>\n' }}", end))
        prompt = prompt_of(processor, answers("what?", "two", "and?", "three"))
        assert shown(processor, prompt) == ["two<|im_end|>", "three<|im_end|>"]
        assert processor.tokenizer.decode(prompt.token_ids).count("<|im_end|>") == 2 + 2 * (last[0] == "n")


def test_a_special_token_that_starts_a_turn_does_not_end_one(using: Callable[[str], Any]):
    processor = using(CHATML.replace(r"{{ '<|im_end|>\n' }}", ""))
    for talk in (answers("what?", "two", "and?", "three"), answers("what?", "two", "and?", "three", "so?")):
        wanted = ["two<|im_end|>", "three<|im_end|>"]
        assert shown(processor, prompt_of(processor, talk)) == wanted


def test_a_conversation_may_start_with_an_answer(using: Callable[[str], Any]):
    for name in set(TEMPLATES) - {"gemma3"}:
        processor = using(name)
        found = shown(processor, prompt_of(processor, answers("hello", "what?", "two", first="assistant")))
        end = end_of_turn(name, processor.tokenizer.eos_token)
        assert [each.lstrip(" ") for each in found] == [f"hello{end}", f"two{end}"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_question_is_the_training_text_up_to_the_generation_prompt(
    name: str, turns: int, using: Callable[[str], Any]
):
    """But for thoughts, which an answered question loses, and the space of the hub's OneVision."""
    processor = using(name)
    example = talk(turns, 1)
    whole, question = prompt_of(processor, example), to_question(processor, example, [INPUT])
    trained = processor.tokenizer.decode(whole.token_ids[: spans(whole)[-1][0]])
    asked = processor.tokenizer.decode(question.token_ids)
    if name.startswith("onevision_hub"):
        trained = trained.removesuffix(" \n") + "\n"
    if name == "qwen3_5_think":
        trained = trained.removesuffix("\n</think>\n\n")
    assert asked == trained
    assert spans(question) == []
    assert asked.count(processor.tokenizer.eos_token) >= turns - 1 or name == "gemma3"


@pytest.mark.parametrize("name", TEMPLATES)
def test_own_answers_follow_the_generation_prompt_as_generated(name: str, using: Callable[[str], Any]):
    processor = using(name)
    end = end_of_turn(name, processor.tokenizer.eos_token)
    example = talk(3, 2)
    said = ("sat", "mat", "cat")
    own = [processor.tokenizer(text + end, add_special_tokens=False).input_ids for text in said]
    prompt = answered_prompt(processor, to_dialogue(processor, example, 2), [INPUT] * 2, own, asks=False)
    assert shown(processor, prompt) == [text + end for text in said]
    told = answers(*(text for pair in zip(QUESTIONS, said, strict=True) for text in pair))
    later = [render_question(processor, told, place) for place in (3, 5)]
    wanted = render_question(processor, example, 1).replace("<image>", "<image>" * 16)
    for text, question in zip(said, later, strict=False):
        wanted += text + end + question.rpartition(text + end)[2]
    assert processor.tokenizer.decode(prompt.token_ids) == wanted + said[-1] + end


def test_own_answers_need_none_in_the_data(using: Callable[[str], Any]):
    example = Sample(
        sample_id="s",
        turns=(
            Turn(role="user", parts=("what?",)),
            Turn(role="assistant", parts=()),
            Turn(role="user", parts=("and?",)),
        ),
    )
    for name in TEMPLATES:
        assert len(to_dialogue(using(name), example, 0).segments) == 2


OPEN_LAST = {
    "separator after": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}"
        "{% if (loop.last and add_generation_prompt) or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "separator before": (
        "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}"
        "{{ m['role'] }}: {{ m['content'][0]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>assistant: {% endif %}",
        "<|im_end|>",
    ),
    "headers only": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'][0]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
        "<|endoftext|>",
    ),
}


@pytest.mark.parametrize("shape", OPEN_LAST)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_last_turn_left_open_ends_as_the_others_do(using, shape, turns):
    template, token = OPEN_LAST[shape]
    processor = using(template)
    eos, processor.tokenizer.eos_token = processor.tokenizer.eos_token, "<|endoftext|>"
    try:
        found = render(processor, talk(turns, 0))
    finally:
        processor.tokenizer.eos_token = eos
    assert [found.text[start:stop].lstrip() for start, stop in found.responses] == [
        answer + token for answer in ANSWERS[:turns]
    ]
    assert found.text.count(token) == (turns if token == "<|endoftext|>" else 2 * turns)


def test_text_does_not_depend_on_the_day(using):
    found = render(using("{{ strftime_now('%d %B %Y') }}: " + fit("qwen3_vl", "<image>")), talk(1, 0)).text
    assert found.startswith("01 January 2026: ")
