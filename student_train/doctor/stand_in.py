"""A cache with made-up targets on the data's real prompts, for a machine that has no teacher.

Ids, log-probs and relation factors are drawn at random; positions, spans, images and sizes are what a dump
of the data would contain. Training on it has the speed and memory of training on a real cache.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache.writer import CacheWriter
from common.chat import ImageInput, ImageSpan, Prompt, to_prompt
from common.data.open import open_source
from common.data.source import SampleSource
from common.doctor.config import DoctorConfig
from common.errors import DataError
from common.fingerprint import fingerprints
from common.images import decode_image, image_bytes
from common.models import ModelRef
from common.processor import load_processor
from common.record import Record, TopK, VisualRecord
from common.spans import response_rows
from common.streams import key_of, stream
from schemas.manifest import Capture, DataSource, Manifest, Relation, SampleSet, TeacherIdentity
from schemas.sample import Sample
from student_train.model import StudentShape, read_shape

_RANK = 24
_TAIL = 0.05
"""Mass left outside the made-up ids."""


def write_stand_in(ref: ModelRef, config: DoctorConfig, place: Path, *, num_samples: int) -> Path:
    """Write the cache.

    Args:
        ref: The student: its own tokens and image settings are used.
        config: Where the data is; how many ids are kept.
        place: Where the cache goes.
        num_samples: Samples at most.

    Raises:
        DataError: None of the samples that were tried can be used.
    """
    source = open_source(config.data, image_root=config.image_root)
    processor = load_processor(ref.path_or_id, revision=ref.revision, options=config)
    shape = read_shape(ref.path_or_id, revision=ref.revision)
    found, first = _samples(source, processor, config.max_len, num_samples)
    if not found:
        raise DataError(f"none of the samples tried can be used: {first}; look at the check data")
    manifest = _manifest(ref, processor, shape, source, topk=config.topk, num_samples=len(found))
    topk = manifest.capture.topk
    with CacheWriter.open(str(place), manifest) as writer:
        records = [
            _record(sample, prompt, topk=topk, vocab_size=manifest.vocab_size) for sample, prompt in found
        ]
        writer.write_part(0, records, first_sample=0, num_samples=len(records))
        writer.finalize()
    return place


def _samples(
    source: SampleSource, processor: Any, max_len: int, wanted: int
) -> tuple[list[tuple[Sample, Prompt]], str]:
    """Usable samples, evenly spaced; the message of the first unusable one."""
    found: list[tuple[Sample, Prompt]] = []
    first = ""
    for place in np.unique(np.linspace(0, len(source) - 1, min(len(source), 4 * wanted)).astype(int)):
        try:
            sample = source[int(place)]
            images = []
            for each in sample.images:
                encoded = image_bytes(each, source.image_root)
                pixels = decode_image(encoded, where=sample.sample_id)
                images.append(ImageInput(hashlib.sha256(encoded).hexdigest(), pixels.height, pixels.width))
            found.append((sample, to_prompt(processor, sample, images, max_len=max_len)))
        except DataError as error:
            first = first or str(error)
        if len(found) == wanted:
            break
    return found, first


def _manifest(
    ref: ModelRef,
    processor: Any,
    shape: StudentShape,
    source: SampleSource,
    *,
    topk: int,
    num_samples: int,
) -> Manifest:
    size = min(len(processor.tokenizer), shape.vocab_rows)
    kept = min(topk, size - 1)
    return Manifest(
        teacher=TeacherIdentity(
            model=ref.name, weights_sha256="0" * 64, model_type=shape.model_type, dtype="float32"
        ),
        fingerprints=fingerprints(processor),
        vocab_rows=shape.vocab_rows,
        vocab_size=size,
        hidden_size=shape.hidden_size,
        samples=SampleSet(fingerprint="0" * 64, num_samples=num_samples),
        data_source=DataSource(path=source.path, image_root=source.image_root),
        capture=Capture(topk=kept, visual_topk=kept, max_len=1 << 20),
        relation=Relation(),
        part_samples=num_samples,
    )


def _record(sample: Sample, prompt: Prompt, *, topk: int, vocab_size: int) -> Record:
    visual = tuple(_visual(image, topk, vocab_size) for image in prompt.images)
    rows = _rows(response_rows(prompt.spans), sample.sample_id, topk, vocab_size)
    return Record(sample.sample_id, sample.kind, prompt.token_ids, prompt.spans, rows, visual)


def _visual(image: ImageSpan, topk: int, vocab_size: int) -> VisualRecord:
    length = image.stop - image.start
    positions = np.arange(image.start, image.stop, dtype=np.int32)
    factor = stream(0, key_of(image.key)).normal(size=(length, min(_RANK, length)))
    return VisualRecord(
        key=image.key,
        image_sha256=image.sha256,
        start=image.start,
        num_positions=length,
        tiles=image.tiles,
        topk=_rows(positions, image.key, topk, vocab_size),
        hidden=None,
        factor=factor.astype(np.float32),
    )


def _rows(positions: NDArray[np.int32], name: str, topk: int, vocab_size: int) -> TopK:
    """[N] rows of K different ids each, log-probs falling, 5 % left outside."""
    draw, num = stream(0, key_of(name)), len(positions)
    first = draw.integers(0, vocab_size, (num, 1))
    ids = (first + np.arange(topk) * max(1, vocab_size // (topk + 1))) % vocab_size
    weights = -np.sort(-draw.random((num, topk)), axis=1) + 1e-3
    logprobs = np.log((1 - _TAIL) * weights / weights.sum(1, keepdims=True))
    tail = np.full((num, 1), np.log(_TAIL))
    return TopK(
        positions=np.asarray(positions, np.int32),
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        log_tail=tail.astype(np.float32),
        logsumexp=np.full((num, 1), 10.0, np.float32),
    )
