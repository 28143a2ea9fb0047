"""The teacher answers first: every assistant turn of a wave's samples, given its own earlier answers.

    round 0   segment 0 ─> answer 0                            all samples of the wave together
    round 1   segment 0, answer 0, segment 1 ─> answer 1       those with another turn to answer

What comes out is a prepared sample like any other: its answers are response spans, token for token as
they were drawn, the end-of-turn token included. An answer cut at `max_new_tokens` has no such token
and ends its dialogue. Then the same capture runs over the whole sequence as for the data's responses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.chat import Prompt, answered_prompt, image_token_id
from schemas.manifest import Capture, Quarantined
from teacher_dump.engine import Engine, Question
from teacher_dump.prompts import Asked, Prepared


@dataclass(slots=True)
class _Open:
    """A sample with answers still to come."""

    item: Prepared
    asked: Asked
    prompt: Prompt
    answers: list[NDArray[np.int32]]


class Answerer:
    """Turns asked samples into answered ones."""

    def __init__(
        self, engine: Engine, processor: Any, capture: Capture, *, vocab_size: int, vocab_rows: int
    ) -> None:
        """Remember how answers are drawn.

        Args:
            engine: A started engine.
            processor: The teacher's.
            capture: Temperature, length and seed of the answers.
            vocab_size: Real tokens; padding rows of the head are never drawn.
            vocab_rows: Rows of the head.
        """
        self._engine, self._processor, self._capture = engine, processor, capture
        names = [getattr(processor, name, None) for name in ("image_token", "video_token")]
        known = processor.tokenizer.get_vocab()
        marks = {known[name] for name in names if name in known} | {image_token_id(processor)}
        self._banned = tuple(sorted(marks | set(range(vocab_size, vocab_rows))))

    def __call__(self, wave: Sequence[Prepared | Quarantined]) -> list[Prepared | Quarantined]:
        """Answer the samples of a wave that ask; the others pass through."""
        done: dict[int, Prepared | Quarantined] = {}
        left: dict[int, _Open] = {}
        for index, item in enumerate(wave):
            if isinstance(item, Prepared) and item.asked is not None:
                left[index] = _Open(item, item.asked, item.prompt, [])
            else:
                done[index] = item
        while left:
            answers = self._engine.answer([self._question(each) for each in left.values()])
            for (index, state), answer in zip(list(left.items()), answers, strict=True):
                if answer.problem is not None:
                    detail = f"{state.item.sample_id}: {answer.problem}"
                    done[index] = Quarantined(
                        sample_id=state.item.sample_id, reason=answer.reason, detail=detail
                    )
                    del left[index]
                    continue
                state.answers.append(answer.token_ids)
                if answer.finished and len(state.answers) < len(state.asked.dialogue.segments):
                    state.prompt = self._lay_out(state, asks=True)
                    if len(state.prompt.token_ids) < self._capture.max_len:
                        continue
                done[index] = _answered(state.item, self._lay_out(state, asks=False))
                del left[index]
        return [done[index] for index in range(len(wave))]

    def _lay_out(self, state: _Open, *, asks: bool) -> Prompt:
        asked = state.asked
        return answered_prompt(self._processor, asked.dialogue, asked.inputs, state.answers, asks=asks)

    def _question(self, state: _Open) -> Question:
        room = self._capture.max_len - len(state.prompt.token_ids)
        wanted = self._capture.max_new_tokens or room
        key = f"{self._capture.seed} {state.item.sample_id} {len(state.answers)}"
        return Question(
            prompt=state.prompt,
            pixels=state.item.pixels[: len(state.prompt.images)],
            max_tokens=min(room, wanted),
            temperature=self._capture.response_temperature,
            seed=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little"),
            banned=self._banned,
        )


def _answered(item: Prepared, prompt: Prompt) -> Prepared:
    """The sample with its answers; images that a cut conversation never came to are left out."""
    shown = len(prompt.images)
    return replace(
        item, prompt=prompt, pixels=item.pixels[:shown], identities=item.identities[:shown], asked=None
    )
