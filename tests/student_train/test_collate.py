from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cache.reader import CacheReader
from common.chat import load_processor
from common.data.source import open_source
from common.errors import MismatchError
from common.record import Record, TopK
from schemas.sample import Span
from student_train.collate import Example, InputLayout, Wanted, collate, to_targets
from student_train.losses.terms import TERMS
from student_train.model import load_student
from student_train.pixels import PixelLoader
from tests.student_train.conftest import STUDENT

LAYOUT = InputLayout(pad_id=0, image_token_id=3, token_types=False, vocab_size=100)


def topk(positions, token_ids, probabilities, tail):
    log = np.log(np.asarray(probabilities, np.float32))
    return TopK(
        positions=np.asarray(positions, np.int32),
        token_ids=np.asarray(token_ids, np.int32),
        logprobs=log,
        log_tail=np.log(np.asarray(tail, np.float32))[:, None],
        logsumexp=np.zeros((len(positions), 1), np.float32),
    )


def text_record(name, length, answer):
    """A text-only record whose last `answer` tokens are the response."""
    start = length - answer
    rows = np.arange(start - 1, length - 1)
    return Record(
        sample_id=name,
        kind=None,
        token_ids=np.arange(10, 10 + length, dtype=np.int32),
        spans=(Span(kind="prompt", start=0, stop=start), Span(kind="response", start=start, stop=length)),
        response=topk(rows, [[10, 11]] * answer, [[0.5, 0.25]] * answer, [0.25] * answer),
        visual=(),
    )


def test_rows_point_at_the_position_before_the_response_token():
    batch = collate(
        [Example(text_record("a", 7, 2), None), Example(text_record("b", 5, 3), None)], LAYOUT, Wanted(TERMS)
    )
    flat = batch.inputs["input_ids"].reshape(-1)
    assert batch.inputs["input_ids"].shape == (2, 7)
    assert batch.response_labels.tolist() == flat[batch.response_rows + 1].tolist() == [15, 16, 12, 13, 14]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [7, 5]
    assert batch.num_tokens == 12
    assert batch.visual_targets is None
    assert batch.relations == ()


def test_labels_come_from_the_spans_when_no_rows_were_kept():
    record = text_record("a", 7, 2)
    bare = replace(record, response=topk(np.empty(0), np.empty((0, 2)), np.empty((0, 2)), np.empty(0)))
    assert collate([Example(bare, None)], LAYOUT, Wanted({"ce"})).response_labels.tolist() == [15, 16]


def test_only_what_the_terms_need_is_there():
    batch = collate([Example(text_record("a", 7, 2), None)], LAYOUT, Wanted({"ce"}))
    assert batch.response_targets is None


def test_narrower_distributions_get_unused_slots():
    wide = topk([0], [[1, 2, 3]], [[0.5, 0.2, 0.1]], [0.2])
    narrow = topk([0], [[4]], [[0.9]], [0.1])
    targets = to_targets([wide, narrow], 100, Wanted(TERMS))
    assert targets.token_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert targets.logprobs[1, 1:].tolist() == [-np.inf, -np.inf]


def test_padding_rows_of_the_teachers_head_are_conditioned_away():
    targets = to_targets(
        [topk([0, 1], [[5, 100], [5, 6]], [[0.5, 0.2], [0.6, 0.3]], [0.3, 0.1])], 100, Wanted(TERMS)
    )
    assert targets.logprobs.exp().tolist() == pytest.approx(np.array([[0.625, 0], [0.6, 0.3]]))
    assert targets.log_tail.exp().tolist() == pytest.approx([0.375, 0.1])
    assert targets.token_ids[0].tolist() == [5, 0]


def test_another_temperature_goes_through_its_own_normaliser():
    logits = np.random.default_rng(0).normal(size=(3, 50)) * 3
    temperatures = (1.0, 2.5)
    order = np.argsort(-logits)[:, :4]
    kept = np.take_along_axis(logits, order, 1)
    sums = np.stack([np.log(np.exp(logits / t).sum(1)) for t in temperatures], 1)
    kept_mass = np.stack([np.exp(kept / t - sums[:, [i]]).sum(1) for i, t in enumerate(temperatures)], 1)
    cached = TopK(
        np.arange(3, dtype=np.int32),
        order.astype(np.int32),
        (kept - sums[:, :1]).astype(np.float32),
        np.log1p(-kept_mass).astype(np.float32),
        sums.astype(np.float32),
    )
    targets = to_targets([cached], 50, Wanted(TERMS, temperature=2.5, column=1))
    assert targets.logprobs.numpy() == pytest.approx(kept / 2.5 - sums[:, [1]], abs=1e-5)
    assert (targets.logprobs.exp().sum(1) + targets.log_tail.exp()).tolist() == pytest.approx(
        [1, 1, 1], abs=1e-5
    )


def test_another_image_token_is_refused():
    record = replace(text_record("a", 7, 2), token_ids=np.full(7, 3, np.int32))
    with pytest.raises(MismatchError, match="'a': 7 positions hold the student's image token 3"):
        collate([Example(record, None)], LAYOUT, Wanted({"ce"}))


@pytest.fixture(scope="module")
def examples(cache, shapes):
    reader = CacheReader(str(cache))
    pixels = PixelLoader(open_source(str(shapes)), load_processor(STUDENT), keep_bytes=1 << 24)
    records = [reader.read_record(index) for index in range(6)]
    return [Example(record, pixels.load(record), 0, index) for index, record in enumerate(records)]


@pytest.fixture(scope="module")
def layout():
    return InputLayout(
        0, load_student(STUDENT).model.config.image_token_id, token_types=False, vocab_size=440
    )


def test_batched_rows_are_the_records_own(examples, layout):
    """Collated with others, a record keeps the rows, labels and targets it has alone."""
    together = collate(examples, layout, Wanted(TERMS))
    length = together.inputs["input_ids"].shape[1]
    starts = {"response": 0, "visual": 0}
    for at, example in enumerate(examples):
        alone = collate([example], layout, Wanted(TERMS))
        for kind in starts:
            ours, theirs = getattr(together, f"{kind}_rows"), getattr(alone, f"{kind}_rows")
            here = slice(starts[kind], starts[kind] + len(theirs))
            assert ours[here].tolist() == (theirs + at * length).tolist()
            for field in ("token_ids", "logprobs", "log_tail"):
                whole, part = (getattr(getattr(b, f"{kind}_targets"), field) for b in (together, alone))
                assert whole[here].equal(part)
            starts[kind] += len(theirs)
        assert together.relations[at].rows.tolist() == (alone.relations[0].rows + at * length).tolist()
        assert together.relations[at].factor.equal(alone.relations[0].factor)


def test_padding_changes_no_hidden_state(examples, layout):
    student = load_student(STUDENT).eval()
    together = collate(examples, layout, Wanted(TERMS))
    with torch.no_grad():
        hidden = student.hidden(together.inputs).reshape(-1, student.head_weight.shape[1])
        rows = hidden[together.response_rows]
        alone = []
        for example in examples:
            batch = collate([example], layout, Wanted(TERMS))
            alone.append(student.hidden(batch.inputs)[0][batch.response_rows])
    assert (rows - torch.cat(alone)).abs().max() < 1e-4


def test_visual_subset_is_of_the_right_size_and_indexed(examples, layout):
    few = collate(examples, layout, Wanted(TERMS, visual_positions=8, seed=5))
    assert len(few.visual_rows) == len(few.visual_targets.token_ids) == 8 * len(examples)
    whole = collate(examples, layout, Wanted(TERMS))
    places = [whole.visual_rows.tolist().index(row) for row in few.visual_rows.tolist()]
    assert few.visual_targets.logprobs.equal(whole.visual_targets.logprobs[places])
    again = collate(examples, layout, Wanted(TERMS, visual_positions=8, seed=5))
    other = collate(examples, layout, Wanted(TERMS, visual_positions=8, seed=6))
    assert few.visual_rows.equal(again.visual_rows)
    assert not few.visual_rows.equal(other.visual_rows)


def test_batch_moves_whole(examples, layout):
    batch = collate(examples, layout, Wanted(TERMS))
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.response_targets.logprobs.device.type == moved.relations[0].factor.device.type == "meta"
    assert batch.to(torch.device("cpu")) is batch
