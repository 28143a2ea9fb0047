"""Random records that keep every promise of `common.record`, in any ragged shape."""

import dataclasses

import numpy as np

from common.record import Record, TopK, VisualRecord
from schemas.manifest import (
    Capture,
    Encoding,
    Fingerprints,
    Manifest,
    Relation,
    SampleSet,
    TeacherIdentity,
)
from schemas.sample import Span, Tile

VOCAB = 300


def make_manifest(
    *, num_samples=6, part_samples=3, topk=8, vocab=VOCAB, hidden_size=12, **changes
) -> Manifest:
    encoding = Encoding(**{k: changes.pop(k) for k in ("profile", "logits", "logit_step") if k in changes})
    relation = Relation(
        **{k: changes.pop(k) for k in ("store", "hidden_encoding", "tolerance") if k in changes}
    )
    capture = Capture(topk=topk, visual_topk=topk, **changes.pop("capture", {}))
    fields = {
        "teacher": TeacherIdentity(model="t", weights_sha256="0", model_type="llava", dtype="float32"),
        "fingerprints": Fingerprints(tokenizer="a", chat_template="b", image_processor="c"),
        "vocab_rows": vocab,
        "vocab_size": vocab,
        "hidden_size": hidden_size,
        "samples": SampleSet(fingerprint="f", num_samples=num_samples),
        "capture": capture,
        "encoding": encoding,
        "relation": relation,
        "part_samples": part_samples,
    }
    return Manifest(**(fields | changes))


def make_topk(rng, num_rows, *, topk=8, start=0, vocab=VOCAB, spread=3.0, temperatures=(1.0,)) -> TopK:
    """Exact top-k of random dense logits."""
    logits = rng.normal(scale=spread, size=(num_rows, vocab))
    return topk_of(logits, topk=topk, start=start, temperatures=temperatures)


def topk_of(logits, *, topk, start=0, temperatures=(1.0,), counts=None) -> TopK:
    """The sparse view of dense logits [N, V]."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
    lse, tails = [], []
    for temperature in temperatures:
        scaled = logits / temperature
        peak = scaled.max(axis=1, keepdims=True, initial=-1e9)
        total = np.exp(scaled - peak).sum(axis=1)
        rest = np.exp(scaled - peak)
        np.put_along_axis(rest, order, 0.0, axis=1)
        with np.errstate(divide="ignore"):
            lse.append(np.log(total) + peak[:, 0])
            tails.append(np.log(rest.sum(axis=1) / total))
    logsumexp = np.stack(lse, 1)
    logprobs = np.take_along_axis(logits, order, axis=1) - logsumexp[:, :1]
    return TopK(
        positions=np.arange(start, start + len(logits), dtype=np.int32),
        token_ids=np.where(np.isneginf(logprobs), 0, order).astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        log_tail=np.stack(tails, 1).astype(np.float32),
        logsumexp=logsumexp.astype(np.float32),
        counts=counts,
    )


def make_visual(
    rng, number, *, positions=9, topk=8, rank=4, hidden=None, rows=None, vocab=VOCAB
) -> VisualRecord:
    side = int(positions**0.5)
    tiles = (Tile(offset=0, rows=side, columns=side, stride=side),) if positions else ()
    return VisualRecord(
        key=f"{number:032x}",
        image_sha256=f"{number:064x}",
        start=2,
        num_positions=positions,
        tiles=tiles,
        topk=None
        if topk is None
        else make_topk(rng, positions if rows is None else rows, topk=topk, start=2, vocab=vocab),
        hidden=None if hidden is None else rng.normal(size=(positions, hidden)).astype(np.float32),
        factor=None if rank is None else rng.normal(size=(positions, rank)).astype(np.float32),
        factor_error=1e-4 * number,
    )


def place_images(images, position) -> list[VisualRecord]:
    """Images one after the other from a position on, their rows with them."""
    placed = []
    for image in images:
        moved, topk = position - image.start, image.topk
        if moved:
            topk = topk and dataclasses.replace(topk, positions=topk.positions + np.int32(moved))
            image = dataclasses.replace(image, start=position, topk=topk)
        placed.append(image)
        position += image.num_positions
    return placed


def make_record(
    rng, name, images=(), *, response=5, topk=8, vocab=VOCAB, kind="caption", temperatures=(1.0,)
) -> Record:
    spans, position, images = [Span(kind="prompt", start=0, stop=2)], 2, place_images(images, 2)
    for image in images:
        spans.append(Span(kind="image", start=position, stop=position + image.num_positions))
        position += image.num_positions
    spans.append(Span(kind="response", start=position, stop=position + response))
    return Record(
        sample_id=name,
        kind=kind,
        token_ids=rng.integers(0, vocab, position + response).astype(np.int32),
        spans=tuple(spans),
        response=make_topk(
            rng, response, topk=topk, start=position - 1, vocab=vocab, temperatures=temperatures
        ),
        visual=tuple(images),
    )


def make_records(rng, count, *, questions=2, first=0, **options) -> list[Record]:
    """Samples that share images, `questions` an image."""
    records = []
    for i in range(first, first + count):
        if i % questions == 0 or not records:
            image = make_visual(rng, i, topk=options.get("topk", 8), vocab=options.get("vocab", VOCAB))
        records.append(
            make_record(rng, f"sample-{i}", (image,), kind=None if i % 3 else "caption", **options)
        )
    return records


def assert_same_topk(found: TopK, wanted: TopK, *, step: float) -> None:
    """Equal up to the step: ids on one step may have swapped, never the first."""
    used = wanted.logprobs > -np.inf
    width = found.token_ids.shape[1]
    assert width >= wanted.token_ids.shape[1] or not len(wanted.positions)
    assert np.array_equal(found.positions, wanted.positions)
    assert np.array_equal((found.logprobs > -np.inf).sum(1), used.sum(1))
    assert (np.diff(np.where(np.isneginf(found.logprobs), -1e30, found.logprobs), axis=1) <= 0).all()
    for row in range(len(wanted.positions)):
        count = int(used[row].sum())
        exact = dict(
            zip(wanted.token_ids[row, :count].tolist(), wanted.logprobs[row, :count].tolist(), strict=True)
        )
        held = dict(
            zip(found.token_ids[row, :count].tolist(), found.logprobs[row, :count].tolist(), strict=True)
        )
        assert held.keys() == exact.keys()
        assert all(abs(held[i] - exact[i]) <= step / 2 * (1 + 1e-5) + 1e-5 * abs(exact[i]) for i in exact)
        assert count == 0 or found.token_ids[row, 0] == wanted.token_ids[row, 0]
        assert not found.token_ids[row, count:].any()
    for name in ("log_tail", "logsumexp"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        finite = ~np.isneginf(b)
        assert (np.abs(a[finite] - b[finite]) <= step / 32 * (1 + 1e-5) + 1e-5 * np.abs(b[finite])).all()


def assert_same_record(found: Record, wanted: Record, *, step: float) -> None:
    assert (found.sample_id, found.kind, found.spans) == (wanted.sample_id, wanted.kind, wanted.spans)
    assert np.array_equal(found.token_ids, wanted.token_ids)
    assert_same_topk(found.response, wanted.response, step=step)
    assert len(found.visual) == len(wanted.visual)
    for a, b in zip(found.visual, wanted.visual, strict=True):
        same = ("key", "image_sha256", "start", "num_positions", "tiles", "factor_error")
        assert all(getattr(a, name) == getattr(b, name) for name in same)
        assert (a.topk is None) == (b.topk is None)
        if b.topk is not None:
            assert_same_topk(a.topk, b.topk, step=step)
        assert (a.factor is None) == (b.factor is None)
        assert (a.hidden is None) == (b.hidden is None)
        if b.factor is not None:
            assert a.factor.shape == b.factor.shape
