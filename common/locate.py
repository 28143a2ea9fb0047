r"""Where answers are in a rendered conversation, and how they end.

    rendering       ...<|im_start|>assistant\na red dog.<|im_end|>\n...      the whole conversation
    with stand-in   ...<|im_start|>assistant\n314159265358<|im_end|>\n...    the same before and behind
                                             └─ answer ─┘└ ending ┘

An answer is found by rendering the conversation again with a stand-in for it: the rendering must be what
precedes the stand-in, the answer, and what follows it, letter for letter. So it does not matter what a
generation prompt looks like, whether the template rewrites earlier turns, or whether the answer's words
occur elsewhere. A template that looks into the answer (for a think block, say) may write other things
around a stand-in; then the stand-in is put after the answer, or before it, and removing it must
give the rendering. `{% generation %}` marks are not used: published templates mark other characters.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

from common.errors import DataError
from common.messages import CURE, Messages, around_difference, render_messages, texts_of, with_text

_DIGITS: Final = 314159265358  # no filter for case, white space or HTML changes digits
_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Ending:
    """What a template writes after an answer."""

    text: str
    """What belongs to the response where nothing follows the answer, up to the end-of-turn token."""
    token: str | None
    """The end-of-turn token: the first that the template writes there, or once a question follows, else the
    tokenizer's."""
    closed: bool
    """Whether `text` ends with the token."""

    def close(self, text: str, stop: int) -> tuple[int, bool]:
        """Where the response ends whose answer ends at `stop`, and whether an end-of-turn token is there."""
        place = len(text) - len(text[stop:].lstrip())
        as_last = text.startswith(self.text, stop)
        if as_last and self.closed:
            return stop + len(self.text), True
        if self.token is not None and text.startswith(self.token, place):
            return place + len(self.token), True
        return (stop + len(self.text) if as_last else stop), False


@dataclass(frozen=True, slots=True)
class Page:
    """One rendering, and the means to make it again with another answer. Made by `Page.of`."""

    processor: Any
    """Whose template it is."""
    where: str
    """The sample, for messages of errors."""
    messages: Messages
    """What was rendered."""
    asks: bool
    """Whether a generation prompt follows."""
    text: str
    """The rendering."""
    mark: str
    """A stand-in that occurs nowhere in the rendering."""

    @classmethod
    def of(cls, processor: Any, messages: Messages, where: str, *, asks: bool = False) -> "Page":
        """Render messages.

        Raises:
            DataError: As `render_messages`.
        """
        text = render_messages(processor, messages, where, asks=asks)
        return cls(processor, where, messages, asks, text, stand_in([text, *texts_of(messages)]))

    @property
    def answered(self) -> list[int]:
        """Turns that are answers."""
        return [place for place, each in enumerate(self.messages) if each["role"] == "assistant"]

    def find(self, place: int) -> tuple[int, int]:
        """Character range of the texts of turn `place`.

        Raises:
            DataError: The rendering does not contain them as they are (`reason="template"`).
        """
        ranges = [self._find(place, part) for part in self._texts(place)]
        return ranges[0][0], ranges[-1][1]

    def ending(self, place: int) -> Ending:
        """What the template writes after the answer of turn `place` when nothing follows."""
        shown = with_text(self.messages[: place + 1], place, self._texts(place)[-1], self.mark)
        tail = render_messages(self.processor, shown, self.where).rpartition(self.mark)[2]
        found = ending_of(self.processor.tokenizer, tail)
        return found if found.closed else replace(found, token=self._later_token(shown) or found.token)

    def _later_token(self, shown: Messages) -> str | None:
        """The token that ends an answer once a question follows: some templates leave the last turn open."""
        mark, tokenizer = stand_in([self.mark, self.text, *texts_of(shown)]), self.processor.tokenizer
        question = {"role": "user", "content": [{"type": "text", "text": mark}]}
        try:
            later = render_messages(self.processor, [*shown, question], self.where)
            alone = render_messages(self.processor, [question], self.where)
        except DataError:  # a template may want an image, or refuse a question there
            return None
        pattern = _added_tokens(tokenizer, len(tokenizer), tokenizer.eos_token)
        after = pattern.search(later.rpartition(self.mark)[2].partition(mark)[0])
        opening = next(
            (each.group() for each in pattern.finditer(alone) if each.group() != tokenizer.bos_token), None
        )
        # What a conversation begins with opens a turn and ends none.
        return after.group() if after is not None and after.group() != opening else None

    def is_closed(self, place: int, ending: Ending) -> bool:
        """Whether an end-of-turn token follows the answer of turn `place`, whatever the answer."""
        _, mark, after = self._again(place, self._texts(place)[-1], self.mark).rpartition(self.mark)
        return bool(mark) and ending.close(after, 0)[1]

    def _texts(self, place: int) -> list[int]:
        parts = self.messages[place]["content"]
        found = [number for number, part in enumerate(parts) if part["type"] == "text" and part["text"]]
        if not found:
            raise DataError(
                f"{self.where}: turn {place} is an answer without text; drop the entry",
                reason="empty-response",
            )
        return found

    def _again(self, place: int, part: int, text: str) -> str:
        changed = with_text(self.messages, place, part, text)
        return render_messages(self.processor, changed, self.where, asks=self.asks)

    def _find(self, place: int, part: int) -> tuple[int, int]:
        answer = self.messages[place]["content"][part]["text"]
        shown = self._again(place, part, self.mark)
        before, mark, after = shown.partition(self.mark)
        if mark and before + answer + after == self.text:
            return len(before), len(before) + len(answer)
        for head, tail in ((answer, ""), ("", answer)):
            left, mark, right = self._again(place, part, head + self.mark + tail).partition(self.mark)
            if mark and left + right == self.text and left.endswith(head) and right.startswith(tail):
                return len(left) - len(head), len(left) + len(tail)
        raise DataError(
            f"{self.where}: turn {place}: the chat template {self._explain(answer, shown)}", reason="template"
        )

    def _explain(self, answer: str, shown: str) -> str:
        """What a template does that neither shows the answer as it is nor leaves the rest alone."""
        number = shown.count(self.mark)
        if number != 1:
            what = repr(answer[:_SHOWN])
            if number == 0:
                return f"leaves the answer {what} out, or changes it; {CURE}"
            return f"writes the answer {what} {number} times; {CURE}"
        before, _, after = shown.partition(self.mark)
        written = self.text.removeprefix(before).removesuffix(after)
        if before + written + after != self.text:
            found, wanted = around_difference(self.text, before + answer + after)
            return (
                f"writes other things around the answer {answer[:_SHOWN]!r} than around other answers: "
                f"found {found!r}, wanted {wanted!r}; {CURE}"
            )
        found, wanted = around_difference(written, answer)
        cure = "take the white space out of the data, or " if written.split() == answer.split() else ""
        return f"changes the answer: found {found!r}, wanted {wanted!r}; {cure}{CURE}"


def stand_in(texts: Sequence[str]) -> str:
    """Digits that no text contains."""
    return next(mark for mark in map(str, count(_DIGITS)) if not any(mark in text for text in texts))


def ending_of(tokenizer: Any, tail: str) -> Ending:
    """The ending that a tail begins with: up to its first special token, or all of it where it has none."""
    eos = tokenizer.eos_token
    found = _added_tokens(tokenizer, len(tokenizer), eos).search(tail)
    return Ending(tail[: found.end()], found.group(), True) if found else Ending(tail.rstrip(), eos, False)


@functools.lru_cache(maxsize=4)
def _added_tokens(tokenizer: Any, size: int, eos: str | None) -> re.Pattern[str]:
    """Any token added beside the words: some ends of turn are none of the tokenizer's named special tokens.

    `size` and `eos` are part of the key because a tokenizer can change between calls.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens if token.strip()) or "(?!)")
