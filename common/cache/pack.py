"""A part's records to the columns of its blocks, and the checks a record must pass first.

records of a block ── unique images ──> sample_*, image_* columns
       response rows ──┐  merged, widened
       visual rows   ──┴───────────────> response_*, visual_* columns (tables.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache import states
from common.cache.bounds import find_fault
from common.cache.codec import IdCoding
from common.cache.image_files import pack_image_files
from common.cache.tables import TableRows, choose_ids, encode_table
from common.errors import DataError
from common.record import Record, TopK, VisualRecord
from schemas.arrays import SPAN_KINDS
from schemas.manifest import Manifest

Array = NDArray[Any]
Columns = dict[str, Array]

_KIND_CODE = {kind: code for code, kind in enumerate(SPAN_KINDS)}


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Everything about a part that goes to disk."""

    blocks: list[Columns]
    """Array name → used values with rows last, for every block."""
    codings: dict[str, IdCoding]
    """How each table's ids are coded."""
    errors: dict[str, float]
    """Worst error of each encoding, measured."""


def pack_part(groups: Sequence[Sequence[Record]], manifest: Manifest) -> PackedPart:
    """Encode the samples of a part.

    Args:
        groups: Samples of each block.
        manifest: Says which encodings.

    Raises:
        DataError: A record breaks the promises of `common.record`.
    """
    errors: dict[str, float] = {}
    images = [unique_images(group) for group in groups]
    blocks = [
        _pack_samples(g, list(v)) | _pack_images(list(v.values()), manifest, errors)
        for g, v in zip(groups, images, strict=True)
    ]
    pieces: dict[str, list[list[TopK | None]]] = {
        "response": [[r.response for r in group] for group in groups],
        "visual": [[v.topk for v in unique.values()] for unique in images],
    }
    codings = {}
    for table, rows in pieces.items():
        merged = [
            merge_rows(block, f"{table} rows of {g[0].sample_id!r} or after", manifest.vocab_rows)
            for block, g in zip(rows, groups, strict=True)
        ]
        held = [block for block in merged if block is not None]
        if held:
            codings[table] = choose_ids(held, manifest.encoding)
            for block, columns in zip(
                blocks, encode_table(merged, codings[table], manifest, errors), strict=True
            ):
                block |= {f"{table}_{name}": values for name, values in columns.items()}
    for group, unique, block in zip(groups, images, blocks, strict=True):
        if (fault := find_fault(block, manifest.vocab_rows)) is not None:
            who = group[fault.number].sample_id if fault.owner == "sample" else list(unique)[fault.number]
            raise DataError(f"{fault.owner} {who!r} {fault.text}; it cannot be sealed", reason="position")
    return PackedPart(blocks, codings, errors)


def unique_images(records: Sequence[Record]) -> dict[str, VisualRecord]:
    """Images of a block by key, in order of first use."""
    images: dict[str, VisualRecord] = {}
    for record in records:
        for visual in record.visual:
            images.setdefault(visual.key, visual)
    return images


def check_topk(rows: TopK, where: str, vocab_rows: int) -> None:
    """Refuse rows that are not what `common.record.TopK` promises.

    Raises:
        DataError: NaN, rising log-probs, ids outside the vocabulary, shapes that disagree.
    """
    num_rows, _ = rows.token_ids.shape
    shapes = (rows.logprobs.shape, len(rows.positions), len(rows.log_tail), rows.logsumexp.shape)
    if shapes != (rows.token_ids.shape, num_rows, num_rows, rows.log_tail.shape):
        raise DataError(f"{where}: arrays of different lengths {shapes}", reason="shape")
    for values in (rows.logprobs, rows.log_tail, rows.logsumexp):
        if np.isnan(values).any() or np.isposinf(values).any():
            raise DataError(
                f"{where}: log-probabilities hold NaN or +inf; the teacher overflowed", reason="nan"
            )
    if (rows.logprobs[:, 1:] > rows.logprobs[:, :-1]).any():
        raise DataError(f"{where}: log-probabilities rise along a row; they must fall", reason="order")
    if (rows.token_ids < 0).any():
        raise DataError(f"{where}: a token id is below 0", reason="ids")
    if (rows.token_ids[rows.logprobs > -np.inf] >= vocab_rows).any():
        raise DataError(
            f"{where}: a kept id is not below {vocab_rows}, the rows of the teacher's head", reason="ids"
        )


def check_finite(values: Array, where: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        DataError: There is one.
    """
    if not np.isfinite(values).all():
        raise DataError(f"{where}: holds NaN or infinity; the teacher overflowed", reason="nan")


def _pack_samples(records: Sequence[Record], keys: Sequence[str]) -> Columns:
    index = {key: i for i, key in enumerate(keys)}
    ids = [r.sample_id.encode() for r in records]
    kinds = [None if r.kind is None else r.kind.encode() for r in records]
    text = b"".join(a + (b or b"") for a, b in zip(ids, kinds, strict=True))
    table = [
        [
            len(r.token_ids),
            len(r.spans),
            len(r.visual),
            len(r.response.positions),
            len(i),
            -1 if k is None else len(k),
        ]
        for r, i, k in zip(records, ids, kinds, strict=True)
    ]
    spans = [(_KIND_CODE[s.kind], s.start, s.stop) for r in records for s in r.spans]
    return {
        "sample_columns": np.array(table, np.int32).T,
        "sample_text": np.frombuffer(text, np.uint8),
        "sample_tokens": np.concatenate([r.token_ids for r in records]).astype(np.int32),
        "sample_spans": np.array(spans, np.int32).reshape(-1, 3).T,
        "sample_images": np.array([index[v.key] for r in records for v in r.visual], np.int32),
    }


def _pack_images(images: Sequence[VisualRecord], manifest: Manifest, errors: dict[str, float]) -> Columns:
    if not images:
        return {}
    table = [
        [
            v.start,
            v.num_positions,
            len(v.tiles),
            -1 if v.topk is None else len(v.topk.positions),
            -1 if v.factor is None else v.factor.shape[1],
            -1 if v.hidden is None else v.hidden.shape[1],
        ]
        for v in images
    ]
    tiles = [(t.offset, t.rows, t.columns, t.stride) for v in images for t in v.tiles]
    keys = b"".join(bytes.fromhex(v.key) + bytes.fromhex(v.image_sha256) for v in images)
    columns: Columns = {
        "image_columns": np.array(table, np.int32).T,
        "image_keys": np.frombuffer(keys, np.uint8),
        "image_errors": np.array([v.factor_error for v in images], np.float64),
        "image_tiles": np.array(tiles, np.int32).reshape(-1, 4).T,
    }
    columns |= _pack_factors(images, manifest.relation.tolerance * states.TOLERANCE_SHARE, errors)
    columns |= _pack_hidden(images, manifest.relation.hidden_encoding, errors)
    return columns | (pack_image_files(images) if manifest.with_images else {})


def _pack_factors(images: Sequence[VisualRecord], tolerance: float, errors: dict[str, float]) -> Columns:
    """Columns of all images side by side: [R, P of all images], narrower factors filled with zeros."""
    held = [v for v in images if v.factor is not None and v.factor.shape[1]]
    if not held:
        return {}
    cells, scales = [], []
    width = max(v.factor.shape[1] for v in held if v.factor is not None)
    for visual in held:
        assert visual.factor is not None
        check_finite(visual.factor, f"factor of image {visual.key}")
        scaled = states.encode_factor(visual.factor, tolerance)
        back = states.decode_factor(scaled.values.T, scaled.scale).T
        error = states.relation_error(visual.factor, back)
        errors["factor_relation"] = max(errors.get("factor_relation", 0.0), error)
        cells.append(np.pad(scaled.values.T, ((0, width - len(scaled.scale)), (0, 0))))
        scales.append(scaled.scale)
    return {"image_factor": np.concatenate(cells, axis=1), "image_factor_scale": np.concatenate(scales)}


def _pack_hidden(images: Sequence[VisualRecord], encoding: str, errors: dict[str, float]) -> Columns:
    """Channels of all images side by side: [D, P of all images]."""
    held = [v for v in images if v.hidden is not None]
    if not held:
        return {}
    cells, scales = [], []
    for visual in held:
        assert visual.hidden is not None
        check_finite(visual.hidden, f"hidden states of image {visual.key}")
        stored, scale = states.encode_hidden(visual.hidden, encoding)
        error = np.abs(states.decode_hidden(stored.T, scale).T - visual.hidden).max(initial=0.0)
        errors["hidden"] = max(errors.get("hidden", 0.0), float(error))
        cells.append(stored.T)
        scales += [] if scale is None else [scale]
    columns = {"image_hidden": np.concatenate(cells, axis=1)}
    return columns | ({"image_hidden_scale": np.concatenate(scales)} if scales else {})


def merge_rows(pieces: Sequence[TopK | None], where: str, vocab_rows: int) -> TableRows | None:
    """All rows of a table of a block, widened to the widest K; None when there are none.

    Raises:
        DataError: A piece breaks the promises of `TopK`.
    """
    for piece in pieces:
        if piece is not None:
            check_topk(piece, where, vocab_rows)
    owners = tuple(0 if piece is None else len(piece.positions) for piece in pieces)
    rows = [piece for piece in pieces if piece is not None and len(piece.positions)]
    if not rows:
        return None
    width = max(piece.token_ids.shape[1] for piece in rows)
    counts = None
    if any(piece.counts is not None for piece in rows):
        counts = np.concatenate([_widen(_counts(p), width, 0) for p in rows])
    merged = TopK(
        positions=np.concatenate([p.positions for p in rows]).astype(np.int32),
        token_ids=np.concatenate([_widen(p.token_ids, width, 0) for p in rows]).astype(np.int32),
        logprobs=np.concatenate([_widen(p.logprobs, width, -np.inf) for p in rows]).astype(np.float32),
        log_tail=np.concatenate([p.log_tail for p in rows]).astype(np.float32),
        logsumexp=np.concatenate([p.logsumexp for p in rows]).astype(np.float32),
        counts=counts,
    )
    return TableRows(merged, owners)


def _counts(rows: TopK) -> Array:
    return np.zeros(rows.token_ids.shape, np.int32) if rows.counts is None else rows.counts


def _widen(values: Array, width: int, fill: float) -> Array:
    missing = width - values.shape[1]
    return values if missing == 0 else np.pad(values, ((0, 0), (0, missing)), constant_values=fill)
