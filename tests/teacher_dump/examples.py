"""Samples and submissions that the engine tests share; the same ones in every process."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from common.chat import ImageInput, to_prompt
from common.images import decode_image
from common.spans import response_rows
from schemas.sample import ImageRef, Sample, Turn
from teacher_dump.engine import Submission
from teacher_dump.prompts import Prepared
from teacher_dump.request import CaptureRequest, ImageIdentity, hash_tokens, pixel_identity

SIZES = [(48, 60), (56, 56), (90, 61), (40, 120), (123, 77)]
QUESTIONS = [
    "what is this?",
    "is the dog on the mat?",
    "describe two of the cats.",
    "what colour? red, green or blue?",
]
ANSWERS = ["a red dog.", "two", "a green cat sat on a big blue mat and the dog sat in the picture"]


def picture(seed: int, height: int, width: int) -> bytes:
    """A PNG of smooth noise."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 255, (7, 7, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def sample(name: str, pictures: Sequence[bytes], turns: int = 1, shift: int = 0) -> Sample:
    """Some pictures, then `turns` questions with answers."""
    talk = []
    for turn in range(turns):
        marks = range(len(pictures)) if turn == 0 else ()
        talk.append(Turn(role="user", parts=(*marks, QUESTIONS[(turn + shift) % len(QUESTIONS)])))
        talk.append(Turn(role="assistant", parts=(ANSWERS[(turn + shift) % len(ANSWERS)],)))
    return Sample(sample_id=name, images=tuple(ImageRef(data=each) for each in pictures), turns=tuple(talk))


def samples() -> list[Sample]:
    """One and several turns; none, one and two images; an image that two samples share."""
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    return [
        *(
            sample(f"one-{index}", [each], turns=1 + index % 3, shift=index)
            for index, each in enumerate(pictures)
        ),
        sample("shared", [pictures[0]], shift=2),
        sample("two", pictures[1:3], turns=2),
        sample("text", [], turns=2, shift=1),
    ]


def questions_on_one_image() -> list[Sample]:
    """Ten questions on one image, one of them asked three times with the same answer."""
    shown = [picture(4, *SIZES[4])]
    different = [sample(f"q{index}", shown, turns=1 + index % 2, shift=index) for index in range(8)]
    same = [sample(f"again{index}", shown, turns=3, shift=1) for index in range(3)]
    return [*different, *same]


def prepare(processor: Any, example: Sample) -> Prepared:
    """As the dump prepares it."""
    encoded = [each.data or b"" for each in example.images]
    pixels = [decode_image(each, where=example.sample_id) for each in encoded]
    inputs = [
        ImageInput(hashlib.sha256(data).hexdigest(), image.height, image.width)
        for data, image in zip(encoded, pixels, strict=True)
    ]
    prompt = to_prompt(processor, example, inputs)
    return Prepared(example.sample_id, None, prompt, tuple(pixels), tuple(map(pixel_identity, pixels)))


def submission(item: Prepared) -> Submission:
    """Everything wanted: all response rows, all rows and states of every image."""
    images = item.prompt.images
    request = CaptureRequest(
        key=item.sample_id,
        num_positions=len(item.prompt.token_ids),
        token_sha256=hash_tokens(item.prompt.token_ids),
        images=tuple(
            ImageIdentity(identity, image.start, image.stop)
            for identity, image in zip(item.identities, images, strict=True)
        ),
        response_rows=response_rows(item.prompt.spans),
        visual_rows=tuple(np.arange(image.start, image.stop, dtype=np.int32) for image in images),
    )
    return Submission(request, item.prompt, item.pixels)
