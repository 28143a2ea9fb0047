"""From prepared samples to records: ask for each image's knowledge once, hand it to all who share it.

    wave     s0 (image a)   s1 (image a)   s2 (image b)
    asked    a and rows     rows only      b and rows
    records  s0 → a         s1 → a         s2 → b           one VisualRecord object an image and prefix

When the sample that asked for an image is refused, the others ask again in a wave of their own.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.chat import ImageSpan
from common.record import Record, TopK, VisualRecord
from common.spans import response_rows
from common.streams import stream
from schemas.manifest import Capture, Quarantined
from teacher_dump.answers import Answerer
from teacher_dump.attempts import Attempt
from teacher_dump.engine import Engine, Submission
from teacher_dump.isolate import Isolation
from teacher_dump.prompts import Prepared
from teacher_dump.request import (
    Captured,
    CapturedImage,
    CapturedRows,
    CaptureRequest,
    ImageIdentity,
    hash_tokens,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part's samples, in plan order."""

    records: list[Record]
    """Those the teacher answered."""
    quarantined: list[Quarantined]
    """Those it could not."""


class PartCapture:
    """Runs parts through the engine, one after another; image knowledge is shared within a part."""

    def __init__(
        self,
        engine: Engine,
        capture: Capture,
        *,
        wave: int,
        answerer: Answerer | None = None,
        with_images: bool = False,
        restarts: int = 0,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """Start with nothing known.

        Args:
            engine: A started engine.
            capture: What is kept.
            wave: Samples submitted together.
            answerer: Answers samples first, where the teacher gives the responses.
            with_images: Whether records carry the encoded image files.
            restarts: Times that an engine that died may be started again.
            say: Takes one line about each.
        """
        self._engine, self._capture, self.wave, self._answerer = engine, capture, wave, answerer
        self._with_images = with_images
        self._bank: dict[str, VisualRecord] = {}
        self._isolation = Isolation(self._run_wave, engine.restart, restarts=restarts, say=say)

    def run(
        self, items: Iterable[Prepared | Quarantined], attempt: Attempt | None = None
    ) -> Iterator[list[Record | Quarantined]]:
        """Results of one part, wave by wave, in order.

        Args:
            items: The part's samples, prepared.
            attempt: Knows samples that killed the engine before, and takes those that do now.

        Raises:
            EngineStopped: The engine died, and no sample is to blame or it was started again too often.
            EngineError: It does not start again.
        """
        self._bank.clear()
        self._isolation.prepare(self._engine.forget)  # a part's values must not depend on the parts before it
        condemned = attempt.condemned if attempt is not None else {}
        wave: list[Prepared | Quarantined] = []
        for item in items:
            wave.append(condemned.get(item.sample_id, item))
            if len(wave) == self.wave:
                yield self._isolation.run(wave, attempt)
                wave = []
        if wave:
            yield self._isolation.run(wave, attempt)

    def _run_wave(self, wave: Sequence[Prepared | Quarantined]) -> list[Record | Quarantined]:
        wave = wave if self._answerer is None else self._answerer(wave)
        done: dict[str, Record | Quarantined] = {}
        left = [item for item in wave if isinstance(item, Prepared)]
        while left:
            results = self._engine.run(self._submissions(left))
            for item, captured in zip(left, results, strict=True):
                if captured.problem is None:
                    self._learn(item, captured)
            again = []
            for item, captured in zip(left, results, strict=True):
                if captured.problem is not None:
                    done[item.sample_id] = quarantine(item, captured)
                elif not self._wants_visual or all(image.key in self._bank for image in item.prompt.images):
                    done[item.sample_id] = self._record(item, captured)
                else:
                    again.append(item)
            assert len(again) < len(left), "an engine that refuses nobody answers everybody"
            left = again
        return [item if isinstance(item, Quarantined) else done[item.sample_id] for item in wave]

    @property
    def _wants_visual(self) -> bool:
        return "visual" in self._capture.positions

    def _submissions(self, items: Sequence[Prepared]) -> list[Submission]:
        claimed = set(self._bank)
        submissions = []
        for item in items:
            asked = []
            for image in item.prompt.images:
                fresh = self._wants_visual and image.key not in claimed
                claimed.add(image.key)
                asked.append(visual_rows(image, self._capture) if fresh else None)
            submissions.append(Submission(self._request(item, asked), item.prompt, item.pixels))
        return submissions

    def _request(self, item: Prepared, asked: Sequence[NDArray[np.int32] | None]) -> CaptureRequest:
        prompt = item.prompt
        wants_response = "response" in self._capture.positions
        return CaptureRequest(
            key=item.sample_id,
            num_positions=len(prompt.token_ids),
            token_sha256=hash_tokens(prompt.token_ids),
            images=tuple(
                ImageIdentity(identity, image.start, image.stop)
                for identity, image in zip(item.identities, prompt.images, strict=True)
            ),
            response_rows=response_rows(prompt.spans) if wants_response else np.empty(0, np.int32),
            visual_rows=tuple(asked),
        )

    def _learn(self, item: Prepared, captured: Captured) -> None:
        for index, found in captured.images.items():
            image = item.prompt.images[index]
            self._bank[image.key] = visual_record(image, found, visual_rows(image, self._capture))

    def _record(self, item: Prepared, captured: Captured) -> Record:
        prompt, capture = item.prompt, self._capture
        rows = response_rows(prompt.spans) if "response" in capture.positions else np.empty(0, np.int32)
        response = captured.response or _no_rows(capture.topk, len(capture.temperatures))
        visual = tuple(self._bank.get(image.key) or _seen(image) for image in prompt.images)
        if self._with_images:
            visual = tuple(replace(v, encoded=data) for v, data in zip(visual, item.encoded, strict=False))
        return Record(
            item.sample_id, item.kind, prompt.token_ids, prompt.spans, to_topk(response, rows), visual
        )


def visual_rows(image: ImageSpan, capture: Capture) -> NDArray[np.int32]:
    """[N] positions of an image whose rows are kept: all, or a share drawn from (seed, image key)."""
    length = image.stop - image.start
    fraction = capture.visual_fraction
    if fraction == 1.0:
        return np.arange(image.start, image.stop, dtype=np.int32)
    draw = stream(capture.seed, int(image.key[:16], 16))
    kept = draw.permutation(length)[: max(int(fraction > 0), round(length * fraction))]
    return (np.sort(kept) + image.start).astype(np.int32)


def visual_record(image: ImageSpan, found: CapturedImage, rows: NDArray[np.int32]) -> VisualRecord:
    """An image's knowledge as the cache holds it."""
    return VisualRecord(
        key=image.key,
        image_sha256=image.sha256,
        start=image.start,
        num_positions=image.stop - image.start,
        tiles=image.tiles,
        topk=None if found.rows is None else to_topk(found.rows, rows),
        hidden=found.hidden,
        factor=found.factor,
        factor_error=found.factor_error,
    )


def _seen(image: ImageSpan) -> VisualRecord:
    """What a record says of an image when no knowledge of it is kept: which one it was, and where."""
    return VisualRecord(
        key=image.key,
        image_sha256=image.sha256,
        start=image.start,
        num_positions=image.stop - image.start,
        tiles=image.tiles,
        topk=None,
        hidden=None,
        factor=None,
    )


def to_topk(rows: CapturedRows, positions: NDArray[np.int32]) -> TopK:
    """Captured rows at their positions."""
    return TopK(positions, rows.token_ids, rows.logprobs, rows.log_tail, rows.logsumexp, rows.counts)


def quarantine(item: Prepared, captured: Captured) -> Quarantined:
    """Why the engine refused a sample."""
    detail = f"{item.sample_id}: {captured.problem}"
    return Quarantined(sample_id=item.sample_id, reason=captured.reason, detail=detail)


def split(results: Iterable[Record | Quarantined]) -> PartResult:
    """Records and quarantined samples apart."""
    together = list(results)
    return PartResult(
        [each for each in together if isinstance(each, Record)],
        [each for each in together if isinstance(each, Quarantined)],
    )


def _no_rows(topk: int, temperatures: int) -> CapturedRows:
    floats = np.empty((0, topk), np.float32), np.empty((0, temperatures), np.float32)
    return CapturedRows(np.empty((0, topk), np.int32), floats[0], floats[1], floats[1])
