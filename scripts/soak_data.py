"""Small levels whose every record can be made again from its number: the truth that `soak` compares with."""

from functools import lru_cache
from typing import Final

import numpy as np

from common.record import Record, TopK, VisualRecord
from schemas.manifest import Capture, Fingerprints, Manifest, SampleSet, TeacherIdentity
from schemas.sample import Span, Tile

NUM_PARTS: Final = 8
PART_SAMPLES: Final = 4
TOPK: Final = 8
VOCAB: Final = 500


def level(number: int) -> Manifest:
    """The manifest of level `number`."""
    return Manifest(
        teacher=TeacherIdentity(
            model=f"soak-{number}", weights_sha256="0", model_type="none", dtype="float32"
        ),
        fingerprints=Fingerprints(tokenizer="0", chat_template="0", image_processor="0"),
        vocab_rows=VOCAB,
        vocab_size=VOCAB,
        hidden_size=8,
        samples=SampleSet(fingerprint=str(number), num_samples=NUM_PARTS * PART_SAMPLES),
        capture=Capture(topk=TOPK, visual_topk=TOPK),
        part_samples=PART_SAMPLES,
    )


@lru_cache(maxsize=256)
def part_records(number: int, part: int) -> tuple[Record, ...]:
    """The records of one part; two samples share an image."""
    rng = np.random.default_rng([number, part])
    records, image = [], _image(rng, f"{number}-{part}-0")
    for i in range(PART_SAMPLES):
        if i % 2 == 0:
            image = _image(rng, f"{number}-{part}-{i}")
        length = int(rng.integers(1, 12))
        stop = 2 + image.num_positions
        spans = (
            Span(kind="prompt", start=0, stop=2),
            Span(kind="image", start=2, stop=stop),
            Span(kind="response", start=stop, stop=stop + length),
        )
        tokens = rng.integers(0, VOCAB, stop + length).astype(np.int32)
        name = f"sample-{number}-{part}-{i}"
        records.append(Record(name, "soak", tokens, spans, _rows(rng, length, stop - 1), (image,)))
    return tuple(records)


def _image(rng: np.random.Generator, name: str) -> VisualRecord:
    key = f"{abs(hash(tuple(name.encode()))):032x}"[:32]
    tile = Tile(offset=0, rows=3, columns=3, stride=3)
    factor = rng.normal(size=(9, 3)).astype(np.float32)
    return VisualRecord(key, key * 2, 2, 9, (tile,), _rows(rng, 9, 2), None, factor)


def _rows(rng: np.random.Generator, count: int, first: int) -> TopK:
    logits = -np.sort(-rng.normal(scale=3, size=(count, VOCAB)), axis=1)
    logsumexp = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logprobs = (logits - logsumexp)[:, :TOPK]
    tail = np.log(np.exp((logits - logsumexp)[:, TOPK:]).sum(axis=1, keepdims=True))
    ids = np.argsort(rng.random((count, VOCAB)), axis=1)[:, :TOPK]
    positions = np.arange(first, first + count, dtype=np.int32)
    narrow = [a.astype(np.float32) for a in (logprobs, tail, logsumexp)]
    return TopK(positions, ids.astype(np.int32), *narrow)


def same_record(found: Record, truth: Record) -> bool:
    """Whether a record read back is the one written, to the stated errors."""
    same = (found.sample_id, found.kind, found.spans) == (truth.sample_id, truth.kind, truth.spans)
    same = (
        same and np.array_equal(found.token_ids, truth.token_ids) and len(found.visual) == len(truth.visual)
    )
    if not same or not _same_rows(found.response, truth.response):
        return False
    for a, b in zip(found.visual, truth.visual, strict=True):
        if (a.key, a.image_sha256, a.tiles) != (b.key, b.image_sha256, b.tiles):
            return False
        if a.topk is None or b.topk is None or not _same_rows(a.topk, b.topk):
            return False
        if a.factor is None or b.factor is None or np.abs(a.factor - b.factor).max() > 0.02:
            return False
    return True


def _same_rows(found: TopK, truth: TopK) -> bool:
    if found.token_ids.shape != truth.token_ids.shape or not np.array_equal(found.positions, truth.positions):
        return False
    a, b = np.argsort(found.token_ids, axis=1), np.argsort(truth.token_ids, axis=1)
    same = np.array_equal(
        np.take_along_axis(found.token_ids, a, 1), np.take_along_axis(truth.token_ids, b, 1)
    )
    gap = np.take_along_axis(found.logprobs, a, 1) - np.take_along_axis(truth.logprobs, b, 1)
    return (
        same and bool(np.abs(gap).max() < 0.04) and bool(np.abs(found.log_tail - truth.log_tail).max() < 0.01)
    )
