"""Records to the flat arrays of a block, and the checks a record must pass first.

records of a block ── unique images ──> sample_*, image_* columns
       response rows ──┐
       visual rows   ──┴─ codec ──> codes, dictionary, logits, scalars [.., N]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache import codec
from common.errors import DataError
from common.record import Record, TopK, VisualRecord
from schemas.arrays import SPAN_KINDS
from schemas.manifest import Manifest

Array = NDArray[Any]
Columns = dict[str, Array]

_KIND_CODE = {kind: code for code, kind in enumerate(SPAN_KINDS)}


def check_topk(rows: TopK, where: str) -> None:
    """Refuse rows that are not what `common.record.TopK` promises.

    Raises:
        DataError: NaN, rising log-probs, ids below 0, shapes that disagree.
    """
    num_rows, _ = rows.token_ids.shape
    shapes = (rows.logprobs.shape, len(rows.positions), len(rows.log_tail), len(rows.logsumexp))
    if shapes != (rows.token_ids.shape, num_rows, num_rows, num_rows):
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


def pack_block(records: Sequence[Record], manifest: Manifest, errors: dict[str, float]) -> Columns:
    """Encode the samples of one block.

    Args:
        records: Samples of the block, in order.
        manifest: Says which encodings.
        errors: Worst errors so far, raised in place.

    Returns:
        Array name → values, rows last, not yet padded.
    """
    images: dict[str, VisualRecord] = {}
    for record in records:
        for visual in record.visual:
            images.setdefault(visual.key, visual)
    columns = _pack_samples(records, {key: i for i, key in enumerate(images)})
    columns |= _pack_images(list(images.values()), manifest, errors)
    pieces = {
        "response": [r.response for r in records],
        "visual": [v.topk for v in images.values() if v.topk is not None],
    }
    for table, rows in pieces.items():
        merged = merge_rows(rows, f"{table} rows of {records[0].sample_id!r} and those after it")
        if merged is not None:
            columns |= {f"{table}_{k}": v for k, v in pack_rows(merged, manifest, errors).items()}
    return columns


def _pack_samples(records: Sequence[Record], image_index: dict[str, int]) -> Columns:
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
        "sample_images": np.array([image_index[v.key] for r in records for v in r.visual], np.int32),
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
    columns |= _pack_factors([v for v in images if v.factor is not None], errors)
    columns |= _pack_hidden(
        [v for v in images if v.hidden is not None], manifest.relation.hidden_encoding, errors
    )
    return columns


def _pack_factors(images: Sequence[VisualRecord], errors: dict[str, float]) -> Columns:
    cells, scales = [], []
    for visual in images:
        assert visual.factor is not None
        check_finite(visual.factor, f"factor of image {visual.key}")
        scaled = codec.encode_factor(visual.factor)
        error = np.abs(scaled.values * scaled.scale - visual.factor).max(initial=0.0)
        errors["factor"] = max(errors.get("factor", 0.0), float(error))
        cells.append(scaled.values.T.reshape(-1))
        scales.append(scaled.scale)
    if not cells:
        return {}
    return {"image_factor": np.concatenate(cells), "image_factor_scale": np.concatenate(scales)}


def _pack_hidden(images: Sequence[VisualRecord], encoding: str, errors: dict[str, float]) -> Columns:
    cells, scales = [], []
    for visual in images:
        hidden = visual.hidden
        assert hidden is not None
        check_finite(hidden, f"hidden states of image {visual.key}")
        stored: Array = hidden.astype(np.float32)
        back: Array = stored
        if encoding == "bfloat16":
            stored = codec.to_bfloat16(hidden)
            back = codec.from_bfloat16(stored)
        elif encoding == "int8":
            scaled = codec.encode_int8(hidden)
            stored, back = scaled.values, scaled.values * scaled.scale[:, None]
            scales.append(scaled.scale)
        errors["hidden"] = max(errors.get("hidden", 0.0), float(np.abs(back - hidden).max(initial=0.0)))
        cells.append(stored.T.reshape(-1))
    columns = {"image_hidden": np.concatenate(cells)} if cells else {}
    return columns | ({"image_hidden_scale": np.concatenate(scales)} if scales else {})


def check_finite(values: Array, where: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        DataError: There is one.
    """
    if not np.isfinite(values).all():
        raise DataError(f"{where}: holds NaN or infinity; the teacher overflowed", reason="nan")


def merge_rows(rows: Sequence[TopK], where: str) -> TopK | None:
    """All rows of a table in one, padded to the widest K; None when there are none.

    Raises:
        DataError: A piece breaks the promises of `TopK`.
    """
    for piece in rows:
        check_topk(piece, where)
    rows = [piece for piece in rows if len(piece.positions)]
    if not rows:
        return None
    width = max(piece.token_ids.shape[1] for piece in rows)
    counts = None
    if any(piece.counts is not None for piece in rows):
        counts = np.concatenate([_widen(_counts(p), width, 0) for p in rows])
    return TopK(
        positions=np.concatenate([p.positions for p in rows]).astype(np.int32),
        token_ids=np.concatenate([_widen(p.token_ids, width, 0) for p in rows]).astype(np.int32),
        logprobs=np.concatenate([_widen(p.logprobs, width, -np.inf) for p in rows]).astype(np.float32),
        log_tail=np.concatenate([p.log_tail for p in rows]).astype(np.float32),
        logsumexp=np.concatenate([p.logsumexp for p in rows]).astype(np.float32),
        counts=counts,
    )


def _counts(rows: TopK) -> Array:
    return np.zeros(rows.token_ids.shape, np.int32) if rows.counts is None else rows.counts


def _widen(values: Array, width: int, fill: float) -> Array:
    missing = width - values.shape[1]
    return values if missing == 0 else np.pad(values, ((0, 0), (0, missing)), constant_values=fill)


def pack_rows(rows: TopK, manifest: Manifest, errors: dict[str, float]) -> Columns:
    """Encode one table's rows.

    Args:
        rows: Checked rows of one width.
        manifest: Says which encoding of logits.
        errors: Worst errors so far, raised in place.
    """
    used = rows.logprobs > -np.inf
    code = codec.encode_ids(rows.token_ids, used)
    codes, order_free = code.codes, rows.counts is None
    columns: Columns = {
        "positions": rows.positions,
        "scalars": np.concatenate([rows.logprobs[:, :1], rows.log_tail, rows.logsumexp], axis=1).T,
        "kept": used.sum(axis=1).astype(np.int64),
        "dictionary": code.dictionary,
    }
    encoding, step = manifest.encoding.logits, manifest.encoding.logit_step
    if encoding == "steps":
        steps = codec.quantise_logprobs(rows.logprobs, used, step)
        finite = np.where(used, rows.logprobs, 0.0).astype(np.float64)
        error = np.abs(np.where(used, finite[:, :1] - steps * step - finite, 0.0))
        if order_free:
            steps, codes = codec.canonical_ties(steps, codes, used)
        levels = codec.steps_to_levels(steps, used)
        columns["logits"] = codec.smallest(levels, ("uint16", "uint32"), limit=int(steps.max(initial=0)))
    elif encoding == "bfloat16":
        logits = np.where(used, rows.logprobs, 0.0) + np.where(used, rows.logsumexp[:, :1], 0.0)
        bits = codec.to_bfloat16(logits.astype(np.float32))
        error = np.abs(codec.from_bfloat16(bits) - logits)
        columns["logits"] = np.ascontiguousarray(bits.T)
    else:
        error = np.zeros(1)
        columns["logits"] = np.ascontiguousarray(np.where(used, rows.logprobs, 0.0).astype(np.float32).T)
    errors["logprob_nats"] = max(errors.get("logprob_nats", 0.0), float(error.max(initial=0.0)))
    columns["codes"] = np.ascontiguousarray(codes.T)
    if rows.counts is not None:
        columns["counts"] = np.ascontiguousarray(rows.counts.T)
    return columns
