r"""A conversation as text: with its answers in place, before one of them, or with gaps for all of them.

    render            ...user\nwhat?<|im_end|>\n<|im_start|>assistant\n[a red dog.<|im_end|>]\n
    render_question   ...user\nwhat?<|im_end|>\n<|im_start|>assistant\n
    render_segments   ...user\nwhat?<|im_end|>\n<|im_start|>assistant\n  |  \n<|im_start|>user\nand?...

Training text is the rendering of the whole conversation; a question ends with the template's generation
prompt. The two need not agree letter for letter: a template may write `assistant \n` in a turn and
`assistant\n` as its generation prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from common.errors import ConfigError, DataError
from common.locate import Ending, Page, ending_of, stand_in
from common.messages import CURE, render_messages, texts_of, to_messages
from schemas.sample import Sample, Turn

_QUESTION: Final = Turn(role="user", parts=("what is this?",))
_SHOWN: Final = Turn(role="user", parts=(0, "what is this?"))
_ANSWER: Final = Turn(role="assistant", parts=("a red dog.",))
_PROBES: Final = (
    (_QUESTION, _ANSWER),
    (_SHOWN, _ANSWER),
    (Turn(role="system", parts=("be brief.",)), _SHOWN, _ANSWER),
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str
    """The whole conversation under the chat template."""
    responses: tuple[tuple[int, int], ...]
    """Character ranges of the responses, end-of-turn token included."""


def render(processor: Any, sample: Sample) -> Rendered:
    """The conversation's text, and where its responses are in it.

    A response is the turn's text and the end-of-turn token after it, which is added where the template
    writes none. Spaces right before the answer belong to it: tokenizers join them with its first word.
    Line breaks, names of roles and think blocks that the template adds before it do not.

    Raises:
        DataError: `template` when the template fails, renders nothing, or does not write an answer as it
            is; `end-of-turn` when an answer contains the token that ends it.
    """
    page = Page.of(processor, to_messages(sample), sample.sample_id)
    answered = page.answered
    if not answered:
        return Rendered(page.text, ())
    ranges = [page.find(place) for place in answered]
    if ranges != sorted(ranges):
        raise DataError(
            f"{sample.sample_id}: the chat template writes the turns in another order; {CURE}",
            reason="template",
        )
    return _close(page, ranges, page.ending(answered[-1]))


def render_question(processor: Any, sample: Sample, place: int) -> str:
    """The conversation before turn `place` with a generation prompt; earlier answers end as in `render`.

    Raises:
        DataError: `no-question` when nothing precedes the turn; `template` when the template fails, or an
            earlier answer has no end of turn and cannot be located to give it one.
    """
    _check_asked(sample, place)
    page = Page.of(processor, to_messages(sample)[:place], sample.sample_id, asks=True)
    if not page.answered:
        return page.text
    ending = page.ending(page.answered[-1])
    ranges = [page.find(each) for each in page.answered if not page.is_closed(each, ending)]
    return _close(page, ranges, ending).text


def render_segments(processor: Any, sample: Sample) -> list[str]:
    """The texts around answers that are not generated yet: before the first, and between answers.

    The data's own answers only mark where answers belong; every segment ends with the generation prompt.

    Raises:
        DataError: `no-question` when nothing precedes an answer; `template` when the template fails, or
            does not show earlier answers.
    """
    messages, where = to_messages(sample), sample.sample_id
    mark = stand_in(texts_of(messages))
    places = [place for place, each in enumerate(messages) if each["role"] == "assistant"]
    for place in places:
        messages[place]["content"] = [{"type": "text", "text": mark}]
    if not messages or messages[-1]["role"] != "assistant":
        places.append(len(messages))
    _check_asked(sample, places[0])
    segments = [render_messages(processor, messages[: places[0]], where, asks=True)]
    for before, place in pairwise(places):
        rest = _behind(mark, render_messages(processor, messages[:place], where, asks=True), where)
        tail = _behind(mark, render_messages(processor, messages[: before + 1], where), where)
        segments.append(rest[ending_of(processor.tokenizer, tail).close(rest, 0)[0] :])
    return segments


def end_token(processor: Any) -> str | None:
    """The token that ends every answer under the processor's chat template; None where nothing does."""
    for turns in _PROBES:
        try:
            page = Page.of(processor, to_messages(Sample(sample_id="a probe", turns=turns)), "a probe")
            return page.ending(page.answered[-1]).token
        except DataError:  # some templates want an image, or a system turn
            continue
    return None


def check_template(processor: Any, name: str) -> None:
    """Refuse a chat template that cannot render any conversation.

    Args:
        processor: A processor with a chat template.
        name: Where the template comes from, for the message.

    Raises:
        ConfigError: It is no Jinja template, fails on all of several, or renders nothing.
    """
    _probe(name, lambda sample: render_messages(processor, to_messages(sample), sample.sample_id))


def check_answers(processor: Any, name: str) -> None:
    """Refuse a chat template in which not even a plain answer can be located.

    Raises:
        ConfigError: With what the template does to the answer.
    """
    _probe(name, lambda sample: render(processor, sample))


def _probe(name: str, action: Callable[[Sample], object]) -> None:
    problems = []
    for turns in _PROBES:
        try:
            action(Sample(sample_id=f"{name}, in a test conversation", turns=turns))
            return
        except DataError as error:
            problems.append(error)
    raise ConfigError(str(problems[0])) from problems[0]


def _check_asked(sample: Sample, place: int) -> None:
    if place == 0:
        raise DataError(
            f"{sample.sample_id}: no turn precedes the answer; add a question", reason="no-question"
        )


def _close(page: Page, answers: Sequence[tuple[int, int]], ending: Ending) -> Rendered:
    """The page with an end of turn after every answer; without one a student would never learn to stop."""
    text, inserted, floor = page.text, 0, 0
    ranges = []
    for first, last in answers:
        token = _end_token(page, page.text[first:last], ending)
        start = max(len(page.text[:first].rstrip(" ")), floor) + inserted
        stop, closed = ending.close(text, last + inserted)
        floor = stop - inserted
        if not closed:
            text = text[:stop] + token + text[stop:]
            stop += len(token)
            inserted += len(token)
        ranges.append((start, stop))
    return Rendered(text, tuple(ranges))


def _end_token(page: Page, answer: str, ending: Ending) -> str:
    if ending.token is None:
        raise DataError(
            f"{page.where}: neither the chat template nor the tokenizer has an end-of-turn token; set the "
            "tokenizer's eos_token, or give a template that ends turns (--chat-template FILE)",
            reason="template",
        )
    if ending.token in answer:
        raise DataError(
            f"{page.where}: an answer contains {ending.token!r}, which ends a turn and is added to every "
            "answer; take it out of the data",
            reason="end-of-turn",
        )
    return ending.token


def _behind(mark: str, text: str, where: str) -> str:
    _, found, rest = text.rpartition(mark)
    if not found:
        raise DataError(
            f"{where}: the chat template does not show earlier answers; {CURE}", reason="template"
        )
    return rest
