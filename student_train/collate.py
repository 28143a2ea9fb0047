"""Records and their pixels -> one Batch: right-padded ids, and the rows at which each target holds.

    record b    token_ids [T_b]          row of position p = b * T + p, T the longest of the batch
                response rows p          label = token p + 1, target = cached top-k
                image rows p             target = cached top-k of the row itself
                image span               relation factor

Only what the stage's terms need is put into the batch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import MismatchError
from common.record import Record, TopK, VisualRecord
from common.spans import response_rows
from common.vocab import check_ids
from schemas.sample import Tile
from student_train.batch import Batch, RelationTarget, SparseTargets
from student_train.losses.terms import Term
from student_train.pixels import Pixels, join
from student_train.sampling import choose_positions


@dataclass(frozen=True, slots=True)
class InputLayout:
    """What a batch needs to know of the student."""

    pad_id: int
    """Id that fills the right."""
    image_token_id: int
    """Id at image positions."""
    token_types: bool
    """Whether the model wants `mm_token_type_ids`."""
    vocab_size: int
    """Real tokens that teacher and student share; rows above it pad a head."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sample of a batch."""

    record: Record
    """What the cache holds."""
    pixels: Pixels | None
    """Its images; None for text only."""
    epoch: int = 0
    """Pass over the data that it belongs to."""
    index: int = 0
    """Its index in the cache."""
    teacher_tiles: tuple[tuple[Tile, ...], ...] | None = None
    """The teacher's patch grid of each image, where the record's is the student's own."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which targets a batch carries."""

    terms: Collection[Term]
    """Terms whose targets are wanted."""
    visual_positions: int | None = None
    """Random subset of each image's cached rows to use; None means all."""
    seed: int = 0
    """Seed of that subset."""
    temperature: float = 1.0
    """Temperature of the distributions."""
    column: int = 0
    """Which of the cached normalisers is of that temperature."""
    hidden_relation: bool = False
    """Take relations from raw hidden states where there is no factor: R = H Hᵀ has the factor H."""


def collate(examples: Sequence[Example], layout: InputLayout, wanted: Wanted) -> Batch:
    """Make a batch.

    Args:
        examples: The samples, B of them.
        layout: The student's ids.
        wanted: Which targets to include.

    Raises:
        MismatchError: A record's image positions do not hold the student's image token, or a response
            token leaves the shared vocabulary.
    """
    records = [example.record for example in examples]
    length = max(len(record.token_ids) for record in records)
    positions = [_response_positions(record) for record in records]
    for record, here in zip(records, positions, strict=True):
        check_ids(record.token_ids[here + 1], layout.vocab_size, where=f"sample {record.sample_id!r}")
    kept = _kept_visual(examples, wanted) if "visual_kl" in wanted.terms else []
    responses = [each.response for each in records] if "response_kl" in wanted.terms else []
    return Batch(
        inputs=_inputs(examples, layout, length),
        sample_ids=tuple(record.sample_id for record in records),
        response_rows=torch.from_numpy(
            _concatenate([here + at * length for at, here in enumerate(positions)])
        ),
        response_labels=torch.from_numpy(
            _concatenate([each.token_ids[here + 1] for each, here in zip(records, positions, strict=True)])
        ),
        response_targets=to_targets(responses, layout.vocab_size, wanted) if responses else None,
        visual_rows=torch.from_numpy(_concatenate([topk.positions + at * length for at, topk in kept])),
        visual_targets=to_targets([topk for _, topk in kept], layout.vocab_size, wanted) if kept else None,
        relations=_relations(examples, length, wanted) if "relation" in wanted.terms else (),
        num_tokens=sum(len(record.token_ids) for record in records),
        visual_weights=_visual_weights(examples, kept) if kept and wanted.visual_positions else None,
    )


def _inputs(examples: Sequence[Example], layout: InputLayout, length: int) -> dict[str, Tensor]:
    ids = np.full((len(examples), length), layout.pad_id, np.int64)
    mask = np.zeros((len(examples), length), np.int64)
    for row, example in enumerate(examples):
        tokens = example.record.token_ids
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        _check_marks(example.record, layout.image_token_id)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if layout.token_types:
        marks = (inputs["input_ids"] == layout.image_token_id) & (inputs["attention_mask"] == 1)
        inputs["mm_token_type_ids"] = marks.long()
    return inputs | join([example.pixels for example in examples if example.pixels is not None])


def _check_marks(record: Record, image_token_id: int) -> None:
    found = int(np.count_nonzero(record.token_ids == image_token_id))
    wanted = sum(span.stop - span.start for span in record.spans if span.kind == "image")
    if found != wanted:
        raise MismatchError(
            f"sample {record.sample_id!r}: {found} positions hold the student's image token "
            f"{image_token_id}, the cache's image spans cover {wanted}; the student marks images otherwise "
            f"than the teacher: choose another student"
        )


def _response_positions(record: Record) -> NDArray[np.int32]:
    """[N] positions that predict a response token; from the spans when the cache kept no such rows."""
    return record.response.positions if len(record.response.positions) else response_rows(record.spans)


def _kept_visual(examples: Sequence[Example], wanted: Wanted) -> list[tuple[int, TopK]]:
    """Rows of the batch and the image distributions there, thinned where the stage says so."""
    return [
        (at, _thin(image.topk, wanted, example, number))
        for at, example in enumerate(examples)
        for number, image in enumerate(example.record.visual)
        if image.topk is not None and len(image.topk.positions)
    ]


def _visual_weights(examples: Sequence[Example], kept: Sequence[tuple[int, TopK]]) -> Tensor:
    """Cached rows over chosen rows of each row's image: the weighted mean estimates that over all of them."""
    images = [image.topk for example in examples for image in example.record.visual]
    cached = [len(topk.positions) for topk in images if topk is not None and len(topk.positions)]
    chosen = [len(topk.positions) for _, topk in kept]
    weights = np.divide(cached, chosen).astype(np.float32)
    return torch.from_numpy(np.repeat(weights, chosen))


def _thin(topk: TopK, wanted: Wanted, example: Example, image: int) -> TopK:
    keep = wanted.visual_positions
    if keep is None or keep >= len(topk.positions):
        return topk
    chosen = choose_positions(
        len(topk.positions), keep, seed=wanted.seed, epoch=example.epoch, sample=example.index, image=image
    )
    return TopK(
        positions=topk.positions[chosen],
        token_ids=topk.token_ids[chosen],
        logprobs=topk.logprobs[chosen],
        log_tail=topk.log_tail[chosen],
        logsumexp=topk.logsumexp[chosen],
        counts=None if topk.counts is None else topk.counts[chosen],
    )


def to_targets(distributions: Sequence[TopK], vocab_size: int, wanted: Wanted) -> SparseTargets:
    """Put several records' distributions behind one another as tensors.

    Args:
        distributions: Each [N_i, K_i]; where K differs, the narrower ones get unused slots.
        vocab_size: Real tokens. Ids at and above it pad the teacher's head; the teacher is
            conditioned on the others.
        wanted: Its temperature.

    Returns:
        [N, K] targets at that temperature.
    """
    width = max(topk.token_ids.shape[1] for topk in distributions)
    num = sum(len(topk.positions) for topk in distributions)
    token_ids = np.zeros((num, width), np.int64)
    logprobs = np.full((num, width), -np.inf, np.float32)
    log_tail = np.empty(num, np.float32)
    at = 0
    for topk in distributions:
        here = slice(at, at := at + len(topk.positions))
        token_ids[here, : topk.token_ids.shape[1]] = topk.token_ids
        if topk.counts is None:
            whole = _normalised(_at_temperature(topk, wanted), topk.log_tail[:, wanted.column])
            logprobs[here, : topk.logprobs.shape[1]], log_tail[here] = whole
        else:
            logprobs[here, : topk.logprobs.shape[1]] = drawn_masses(topk.logprobs, topk.counts)
            log_tail[here] = -np.inf
    _drop_padding(token_ids, logprobs, log_tail, vocab_size)
    return SparseTargets(*(torch.from_numpy(array) for array in (token_ids, logprobs, log_tail)))


def drawn_masses(logprobs: NDArray[np.float32], counts: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log of an unbiased estimate of the teacher from ids drawn at random (Sparse Logit Sampling).

    An id drawn c times out of n estimates p by c / n of the mass that no exactly kept id has: of 1 in
    the mode `random`. What was not drawn has mass 0, and the expectation over draws is p itself.

    Args:
        logprobs: [N, K]; −inf slots are unused.
        counts: [N, K] draws; 0 for exactly kept ids.

    Returns:
        [N, K] log masses; −inf where unused.
    """
    exact = np.where(counts == 0, np.exp(logprobs.astype(np.float64)), 0.0)
    left = np.maximum(1.0 - exact.sum(axis=1, keepdims=True), 0.0)
    drawn = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        masses: NDArray[np.float32] = np.log(exact + left * drawn).astype(np.float32)
    return masses


def _at_temperature(topk: TopK, wanted: Wanted) -> NDArray[np.float32]:
    """[N, K] log-probs of logits / temperature, through the normaliser cached for it."""
    if wanted.temperature == 1.0:
        return topk.logprobs
    logits = topk.logprobs + topk.logsumexp[:, :1]
    scaled: NDArray[np.float32] = (
        logits / np.float32(wanted.temperature) - topk.logsumexp[:, wanted.column, None]
    )
    return scaled


def _normalised(
    logprobs: NDArray[np.float32], log_tail: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shift each row so that its mass is 1: a cache's rounding moved it, and divergences then dip below 0."""
    with np.errstate(divide="ignore"):
        shift = np.log(np.exp(logprobs).sum(axis=1) + np.exp(log_tail))
    shift[~np.isfinite(shift)] = 0
    return logprobs - shift[:, None], log_tail - shift


def _drop_padding(
    token_ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    vocab_size: int,
) -> None:
    """Take ids of the teacher's padding rows out, in place, and renormalise what is left."""
    padding = token_ids >= vocab_size
    rows = padding.any(axis=1)
    if not rows.any():
        return
    lost = np.where(padding, np.exp(logprobs), 0).sum(axis=1, dtype=np.float64)
    scale = np.log1p(-np.minimum(lost, 1 - 1e-12)).astype(np.float32)
    logprobs[rows] -= scale[rows, None]
    log_tail[rows] -= scale[rows]
    logprobs[padding] = -np.inf
    token_ids[padding] = 0


def _relations(examples: Sequence[Example], length: int, wanted: Wanted) -> tuple[RelationTarget, ...]:
    return tuple(
        _relation(image, factor, at * length, _teacher_tiles(example, number))
        for at, example in enumerate(examples)
        for number, image in enumerate(example.record.visual)
        if (factor := _factor(image, wanted)) is not None
    )


def _teacher_tiles(example: Example, image: int) -> tuple[Tile, ...]:
    return (example.teacher_tiles or [each.tiles for each in example.record.visual])[image]


def _factor(image: VisualRecord, wanted: Wanted) -> NDArray[np.float32] | None:
    return image.hidden if image.factor is None and wanted.hidden_relation else image.factor


def _relation(
    image: VisualRecord, factor: NDArray[np.float32], offset: int, teacher_tiles: tuple[Tile, ...]
) -> RelationTarget:
    first = offset + image.start
    return RelationTarget(
        rows=torch.arange(first, first + image.num_positions),
        factor=torch.from_numpy(np.array(factor, np.float32)),
        tiles=image.tiles,
        teacher_tiles=teacher_tiles,
    )


def _concatenate(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64)
