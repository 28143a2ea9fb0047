"""Samples made ready ahead of the engine: read, decoded, tokenised in threads, in plan order.

A sample that cannot be used comes out as `Quarantined` with its reason, and the dump continues. That holds
for whatever a library raises over one sample too; settings, disk and engine are what stops a dump.
"""

import hashlib
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.chat import Dialogue, ImageInput, Prompt, answered_prompt, to_dialogue, to_prompt
from common.data.source import SampleSource
from common.errors import CascacheError, DataError, shorten
from common.images import decode_image, image_bytes, image_path
from schemas.manifest import Quarantined
from schemas.sample import ImageRef, Sample
from teacher_dump.request import pixel_identity
from teacher_dump.same_images import SeenFiles

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sample asks, where the teacher answers itself."""

    dialogue: Dialogue
    """Ids before each answer."""
    inputs: tuple[ImageInput, ...]
    """All its images."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample ready for the engine."""

    sample_id: str
    """The sample."""
    kind: str | None
    """Its label, carried over."""
    prompt: Prompt
    """Its tokens, spans and image spans."""
    pixels: tuple["Image", ...]
    """Its images, decoded."""
    identities: tuple[str, ...]
    """`pixel_identity` of each, taken where they were decoded."""
    asked: Asked | None = None
    """What is still to be answered; `prompt` ends where the first answer starts."""
    encoded: tuple[bytes, ...] = ()
    """The files the images were decoded from."""


class Preparer:
    """Turns source indices into prepared samples."""

    def __init__(self, source: SampleSource, processor: Any, *, max_len: int, asks: bool = False) -> None:
        """Remember where samples come from.

        Args:
            source: The samples.
            processor: The teacher's.
            max_len: Longest expanded sequence.
            asks: Whether the teacher answers itself, so that samples are prepared up to their answers.
        """
        self._source, self._processor, self._max_len, self._asks = source, processor, max_len, asks
        self._ids = source.sample_ids()
        self._files = SeenFiles()
        self._tokenizer = threading.Lock()  # a fast tokenizer must not be borrowed twice

    def __call__(self, index: int) -> Prepared | Quarantined:
        """Prepare the sample at `index` of the source.

        Raises:
            CascacheError: The settings are wrong, for every sample alike.
        """
        try:
            return self._prepare(index)
        except DataError as error:
            return Quarantined(sample_id=self._ids[index], reason=error.reason, detail=str(error))
        except CascacheError:
            raise
        except Exception as error:  # noqa: BLE001 - one sample must not stop the others
            return Quarantined(
                sample_id=self._ids[index], reason="sample-error", detail=_describe(self._ids[index], error)
            )

    def _prepare(self, index: int) -> Prepared:
        sample = self._source[index]
        images = [self._read(ref, sample) for ref in sample.images]
        inputs = tuple(each for each, _, _ in images)
        with self._tokenizer:
            prompt, asked = self._prompt(sample, inputs)
        shown = tuple(pixels for _, pixels, _ in images)
        encoded = tuple(data for _, _, data in images)
        identities = tuple(map(pixel_identity, shown))
        return Prepared(sample.sample_id, sample.kind, prompt, shown, identities, asked, encoded)

    def _prompt(self, sample: Sample, inputs: tuple[ImageInput, ...]) -> tuple[Prompt, Asked | None]:
        if not self._asks:
            return to_prompt(self._processor, sample, inputs, max_len=self._max_len), None
        dialogue = to_dialogue(self._processor, sample, len(inputs))
        prompt = answered_prompt(self._processor, dialogue, inputs, [], asks=True)
        if len(prompt.token_ids) >= self._max_len:
            raise DataError(
                f"{sample.sample_id}: the question takes {len(prompt.token_ids)} positions, --max-len is "
                f"{self._max_len}; raise it or shorten the sample",
                reason="too-long",
            )
        return prompt, Asked(dialogue, inputs)

    def _read(self, ref: ImageRef, sample: Sample) -> tuple[ImageInput, "Image", bytes]:
        root = self._source.image_root
        path, encoded = image_path(ref, root), image_bytes(ref, root)
        sha256 = hashlib.sha256(encoded).hexdigest()
        self._files.check(path, sha256, sample.sample_id)
        pixels = decode_image(encoded, where=f"{path or 'inline'} of {sample.sample_id}")
        return ImageInput(sha256, pixels.height, pixels.width), pixels, encoded


def _describe(sample_id: str, error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{sample_id}: preparing it raised {type(error).__name__}: {shorten(str(error))} "
        f"({Path(place.filename).name}, line {place.lineno}); fix or drop the sample"
    )


def prepare_ahead(
    preparer: Preparer, indices: Iterable[int], *, threads: int, ahead: int
) -> Iterator[Prepared | Quarantined]:
    """Prepared samples in the order of `indices`, up to `ahead` of them made before they are asked for."""
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        pending: deque[Future[Prepared | Quarantined]] = deque()
        try:
            for index in indices:
                pending.append(pool.submit(preparer, index))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
