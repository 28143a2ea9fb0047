"""Writes a cache with plain transformers, one sample at a time: the slow twin of the vLLM dump.

Good enough for everything that trains, and quick on the tiny models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.cache.writer import CacheWriter
from common.chat import ImageInput, ImageSpan, Prompt, to_prompt
from common.data.source import SampleSource
from common.fingerprint import fingerprints, weights_sha256
from common.image_settings import image_settings
from common.images import decode_image, image_bytes
from common.processor import load_processor
from common.record import Record, TopK, VisualRecord
from common.relation import factor_relation, head_gram, relation
from common.spans import response_rows
from common.topk import sparse_rows
from schemas.manifest import (
    Capture,
    DataSource,
    Encoding,
    Manifest,
    Relation,
    SampleSet,
    TeacherIdentity,
)
from student_train.model import Student, load_student
from student_train.pixels import preprocess


def dump_plain(
    model: str,
    source: SampleSource,
    out: Path,
    *,
    indices: Sequence[int] | None = None,
    topk: int = 16,
    part_samples: int = 64,
    block_rows: int = 2048,
    vocab_size: int | None = None,
    with_images: bool = False,
) -> Path:
    """Dump a teacher's knowledge of some samples of a source.

    Args:
        model: The teacher's directory.
        source: The samples.
        out: Where the cache goes.
        indices: Which of them; all unless given.
        topk: Kept ids a row.
        part_samples: Samples a part.
        block_rows: Rows a block.
        vocab_size: Real tokens; as many as the tokenizer has unless given.
        with_images: Keep the encoded image files too.
    """
    processor, teacher = load_processor(model), load_student(model)
    teacher.eval()
    chosen = list(range(len(source)) if indices is None else indices)
    manifest = Manifest(
        teacher=TeacherIdentity(
            model=model,
            weights_sha256=weights_sha256(Path(model)),
            model_type=teacher.model.config.model_type,
            dtype="float32",
        ),
        fingerprints=fingerprints(processor),
        vocab_rows=teacher.head_weight.shape[0],
        vocab_size=vocab_size or len(processor.tokenizer),
        hidden_size=teacher.head_weight.shape[1],
        samples=SampleSet(fingerprint=source.fingerprint(), num_samples=len(chosen)),
        data_source=DataSource(path=source.path, image_root=source.image_root),
        capture=Capture(topk=topk, visual_topk=topk),
        relation=Relation(tolerance=1e-4),
        encoding=Encoding(logits="float32"),
        part_samples=part_samples,
        with_images=with_images,
        image_settings=image_settings(processor),
    )
    gram = head_gram(teacher.head_weight.detach()[: manifest.vocab_size])
    with CacheWriter.open(str(out), manifest, block_rows=block_rows) as writer:
        for part, first in enumerate(range(0, len(chosen), part_samples)):
            rows = chosen[first : first + part_samples]
            known: dict[str, VisualRecord] = {}
            records = [_record(teacher, processor, source, row, manifest, gram, known) for row in rows]
            writer.write_part(part, records, first_sample=first, num_samples=len(rows))
        writer.finalize()
    return out


@torch.no_grad()
def _record(
    teacher: Student,
    processor: Any,
    source: SampleSource,
    row: int,
    manifest: Manifest,
    gram: Tensor,
    known: dict[str, VisualRecord],
) -> Record:
    sample = source[row]
    encoded = [image_bytes(image, source.image_root) for image in sample.images]
    images = [decode_image(each, where=sample.sample_id) for each in encoded]
    described = [
        ImageInput(hashlib.sha256(each).hexdigest(), image.height, image.width)
        for each, image in zip(encoded, images, strict=True)
    ]
    prompt = to_prompt(processor, sample, described)
    hidden = _hidden(teacher, processor, prompt, images)
    logits = hidden @ teacher.head_weight[: manifest.vocab_size].T
    for span in prompt.images:
        if span.key not in known:
            known[span.key] = _visual(span, hidden, logits, manifest, gram)
    if manifest.with_images:
        for span, data in zip(prompt.images, encoded, strict=True):
            known[span.key] = replace(known[span.key], encoded=data)
    return Record(
        sample_id=sample.sample_id,
        kind=sample.kind,
        token_ids=prompt.token_ids,
        spans=prompt.spans,
        response=_topk(logits, response_rows(prompt.spans), manifest.capture.topk),
        visual=tuple(known[span.key] for span in prompt.images),
    )


def _hidden(teacher: Student, processor: Any, prompt: Prompt, images: list[Any]) -> Tensor:
    ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs |= preprocess(processor, images).tensors
    if teacher.family.token_types:
        inputs["mm_token_type_ids"] = (ids == teacher.model.config.image_token_id).long()
    return teacher.hidden(inputs)[0]


def _topk(logits: Tensor, positions: NDArray[np.integer], topk: int) -> TopK:
    rows = sparse_rows(logits[torch.from_numpy(positions.astype(np.int64))], topk)
    return TopK(
        positions=positions.astype(np.int32),
        token_ids=rows.token_ids.numpy(),
        logprobs=rows.logprobs.numpy(),
        log_tail=rows.log_tail.numpy(),
        logsumexp=rows.logsumexp.numpy(),
    )


def _visual(
    span: ImageSpan, hidden: Tensor, logits: Tensor, manifest: Manifest, gram: Tensor
) -> VisualRecord:
    factor = factor_relation(
        relation(hidden[span.start : span.stop], gram),
        tolerance=manifest.relation.tolerance,
        max_rank=manifest.relation.max_rank,
    )
    return VisualRecord(
        key=span.key,
        image_sha256=span.sha256,
        start=span.start,
        num_positions=span.stop - span.start,
        tiles=span.tiles,
        topk=_topk(logits, np.arange(span.start, span.stop), manifest.capture.visual_topk),
        hidden=None,
        factor=factor.factor.numpy(),
        factor_error=factor.error,
    )
