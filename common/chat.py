"""A sample as its model reads it: rendered, tokenised once, every position accounted for.

    Sample ──render──> text, response character ranges      the processor's own chat template
           ──tokenise─> prompt ids, one image token an image offsets tell which tokens answer
           ──expand──> token ids as the teacher sees them   spans and patch tiles per image

A response is an answer with the end-of-turn token behind it (added where the template writes none, as
LLaVA-1.5's), without the white space after that; see `common.render`. A token that holds both a character
before the answer and one of it belongs to the response.

A teacher that answers itself reads the same conversation as a dialogue: what stands before each answer,
with its own answers in between, token for token as it gave them.

       segment 0 ── answer 0 ── segment 1 ── answer 1     every assistant turn, given its own earlier ones
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.grids import ImageLayout, image_layout
from common.render import Rendered, render, render_question, render_segments
from common.spans import expand, fill_prompt
from schemas.sample import Sample, Span, Tile, Turn


@dataclass(frozen=True, slots=True)
class ImageInput:
    """What the prompt needs to know of an image."""

    sha256: str
    """Hash of the encoded file's bytes."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where an image stands in the expanded sequence."""

    key: str
    """32 hex digits over the prefix up to its end, image hashes included: equal key, equal knowledge."""
    sha256: str
    """Hash of the encoded file's bytes."""
    start: int
    """First position."""
    stop: int
    """One past the last position."""
    tiles: tuple[Tile, ...]
    """Its patch grids."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample in the model's terms. Axes: M prompt ids, T positions."""

    sample_id: str
    """The sample."""
    prompt_ids: NDArray[np.int32]
    """[M] ids with one image token an image."""
    token_ids: NDArray[np.int32]
    """[T] the expanded sequence the model is expected to see."""
    spans: tuple[Span, ...]
    """Image, prompt and response spans, covering the sequence in order."""
    images: tuple[ImageSpan, ...]
    """One per image, in order."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a teacher is asked that answers itself."""

    sample_id: str
    """The sample."""
    segments: tuple[NDArray[np.int32], ...]
    """Ids before each answer, from the end of the answer before it; one image token an image."""


def to_prompt(
    processor: Any, sample: Sample, images: Sequence[ImageInput], *, max_len: int | None = None
) -> Prompt:
    """The whole conversation with its responses: what a teacher scores and a student learns.

    Args:
        processor: A processor that passed `check_processor`.
        sample: The example; every assistant turn is a response.
        images: Its images, in `sample.images` order.
        max_len: Longest expanded sequence, or None.

    Raises:
        DataError: With a `reason` for quarantine: `image-marks`, `empty-response`, `template`,
            `end-of-turn`, `too-long`, `image-size`.
    """
    _check_turns(sample)
    return _assemble(processor, sample, images, render(processor, sample), max_len)


def to_question(
    processor: Any, sample: Sample, images: Sequence[ImageInput], *, max_len: int | None = None
) -> Prompt:
    """The conversation up to its last assistant turn, ready to generate: no response spans.

    Raises:
        DataError: As `to_prompt`, or `no-question` when nothing precedes the answer.
    """
    turns = sample.turns
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
    asked = sample.model_copy(update={"turns": turns[:last]})
    text = render_question(processor, sample, last)
    return _assemble(processor, asked, images, Rendered(text, ()), max_len)


def to_dialogue(processor: Any, sample: Sample, num_images: int) -> Dialogue:
    """What a teacher is asked that answers every assistant turn itself, and a last turn that waits for one.

    Args:
        processor: A processor that passed `check_processor`.
        sample: The example; its own answers only say where answers belong. It may have none.
        num_images: Images given.

    Raises:
        DataError: `no-question` when nothing precedes an answer, `image-marks`, `template`.
    """
    first, *later = render_segments(processor, sample)
    segments = [_tokenise(processor, first)[0], *(_continue(processor, text) for text in later)]
    marks = sum(int((each == image_token_id(processor)).sum()) for each in segments)
    _check_marks(sample, num_images, marks, processor.image_token)
    return Dialogue(sample.sample_id, tuple(segments))


def answered_prompt(
    processor: Any,
    dialogue: Dialogue,
    images: Sequence[ImageInput],
    answers: Sequence[NDArray[np.int32]],
    *,
    asks: bool,
) -> Prompt:
    """The dialogue with its first answers in place, as response spans.

    Args:
        processor: As for `to_dialogue`.
        dialogue: What is asked.
        images: All images of the sample; those not shown yet are left out.
        answers: [n] ids of the first answers, end-of-turn token included.
        asks: Whether the next segment follows, ready to generate.

    Raises:
        DataError: `image-size`.
    """
    pieces: list[NDArray[np.int32]] = []
    ranges, at = [], 0
    for segment, answer in zip(dialogue.segments, answers, strict=False):
        pieces += [segment, answer]
        ranges.append((at + len(segment), at + len(segment) + len(answer)))
        at = ranges[-1][1]
    if asks:
        pieces.append(dialogue.segments[len(answers)])
    ids = np.concatenate(pieces)
    shown = int((ids == image_token_id(processor)).sum())
    return _lay_out(processor, dialogue.sample_id, ids, images[:shown], ranges)


def image_token_id(processor: Any) -> int:
    """Id of the token that marks an image."""
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def _text(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str))


def _check_turns(sample: Sample) -> None:
    answered = [turn for turn in sample.turns if turn.role == "assistant"]
    if any(isinstance(part, int) for turn in answered for part in turn.parts):
        raise DataError(
            f"{sample.sample_id}: a response marks an image; mark images in questions only",
            reason="image-marks",
        )
    answers = [_text(turn) for turn in answered]
    if not answers or not all(answer.strip() for answer in answers):
        found = "no assistant turn" if not answers else "an empty assistant turn"
        raise DataError(
            f"{sample.sample_id}: {found}; every sample needs a response to score", reason="empty-response"
        )


def _check_marks(sample: Sample, num_images: int, num_marks: int, token: str) -> None:
    order = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    if order != list(range(num_images)) or len(sample.images) != num_images:
        raise DataError(
            f"{sample.sample_id}: turns mark images {order}, {num_images} images are given; mark each image "
            "once, in order",
            reason="image-marks",
        )
    if num_marks != num_images:
        raise DataError(
            f"{sample.sample_id}: the rendered text holds {num_marks} image tokens {token!r} for "
            f"{num_images} images; take the token out of the text, or use a template that shows every image",
            reason="image-marks",
        )


def _tokenise(processor: Any, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[M] ids and [M, 2] character offsets; the beginning-of-sequence token exactly once."""
    tokenizer = processor.tokenizer
    rendered_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not rendered_bos, return_offsets_mapping=True)
    return np.asarray(encoded["input_ids"], np.int32), np.asarray(
        encoded["offset_mapping"], np.int64
    ).reshape(-1, 2)


def _assemble(
    processor: Any, sample: Sample, images: Sequence[ImageInput], rendered: Rendered, max_len: int | None
) -> Prompt:
    ids, offsets = _tokenise(processor, rendered.text)
    num_marks = int((ids == image_token_id(processor)).sum())
    _check_marks(sample, len(images), num_marks, processor.image_token)
    ranges = [_response(sample, offsets, chars) for chars in rendered.responses]
    prompt = _lay_out(processor, sample.sample_id, ids, images, ranges)
    if max_len is not None and len(prompt.token_ids) > max_len:
        raise DataError(
            f"{sample.sample_id}: {len(prompt.token_ids)} positions, --max-len is {max_len}; "
            "raise it or shorten the sample",
            reason="too-long",
        )
    return prompt


def _lay_out(
    processor: Any,
    sample_id: str,
    ids: NDArray[np.int32],
    images: Sequence[ImageInput],
    responses: Sequence[tuple[int, int]],
) -> Prompt:
    """Expand [M] ids; `responses` are ranges of them."""
    marks = np.flatnonzero(ids == image_token_id(processor))
    layouts = [image_layout(processor, each.height, each.width) for each in images]
    edges = [0 if layout.around is None else 1 for layout in layouts]
    lengths = [layout.num_positions + 2 * edge for layout, edge in zip(layouts, edges, strict=True)]
    token_ids, starts = expand(ids, marks, lengths)
    for mark, length, layout in zip(marks, lengths, layouts, strict=True):
        if layout.around is not None:
            token_ids[starts[mark]], token_ids[starts[mark] + length - 1] = layout.around
    places = [int(starts[mark]) + edge for mark, edge in zip(marks, edges, strict=True)]
    shown = _image_spans(token_ids, places, images, layouts)
    spans = [Span(kind="image", start=each.start, stop=each.stop) for each in shown]
    spans += [
        Span(kind="response", start=int(starts[first]), stop=int(starts[stop])) for first, stop in responses
    ]
    spans.sort(key=lambda span: span.start)
    return Prompt(sample_id, ids, token_ids, fill_prompt(spans, len(token_ids)), shown)


def _response(sample: Sample, offsets: NDArray[np.int64], chars: tuple[int, int]) -> tuple[int, int]:
    """Range of tokens that hold one of the characters; special tokens outside the text do not count."""
    inside = np.flatnonzero(
        (offsets[:, 1] > chars[0]) & (offsets[:, 0] < chars[1]) & (offsets[:, 1] > offsets[:, 0])
    )
    if not len(inside) or inside[0] == 0:
        raise DataError(
            f"{sample.sample_id}: no token precedes the response, so nothing predicts it; use a template "
            "that writes a role or a beginning of text before it (--chat-template FILE)",
            reason="template",
        )
    return int(inside[0]), int(inside[-1]) + 1


def _continue(processor: Any, text: str) -> NDArray[np.int32]:
    """[M] ids of text that follows other text."""
    return np.asarray(processor.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _image_spans(
    token_ids: NDArray[np.int32],
    starts: Sequence[int],
    images: Sequence[ImageInput],
    layouts: Sequence[ImageLayout],
) -> tuple[ImageSpan, ...]:
    prefix = hashlib.sha256()
    spans, at = [], 0
    for start, image, layout in zip(starts, images, layouts, strict=True):
        stop = start + layout.num_positions
        prefix.update(token_ids[at:stop].astype("<i4").tobytes())
        prefix.update(bytes.fromhex(image.sha256))
        spans.append(ImageSpan(prefix.hexdigest()[:32], image.sha256, start, stop, layout.tiles))
        at = stop
    return tuple(spans)
