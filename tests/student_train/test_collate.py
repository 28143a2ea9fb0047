from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cache.reader import CacheReader
from common.data.open import open_source
from common.errors import MismatchError
from common.processor import load_processor
from common.record import Record, TopK, VisualRecord
from schemas.sample import Span
from student_train.collate import Example, InputLayout, Wanted, collate, drawn_masses, to_targets
from student_train.losses.objective import Objective, counts_of
from student_train.losses.relation import relation_distances
from student_train.losses.rows import Head
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


def test_rounded_rows_are_distributions_again():
    """Differences within a row stay; its mass, which rounding in steps had moved, is 1."""
    generator = np.random.default_rng(0)
    rounded = topk(np.arange(40), np.tile([1, 2], (40, 1)), generator.uniform(0.1, 0.5, (40, 2)), [0.3] * 40)
    targets = to_targets([rounded], 100, Wanted(TERMS))
    masses = targets.logprobs.exp().sum(1) + targets.log_tail.exp()
    assert masses.tolist() == pytest.approx([1.0] * 40, abs=1e-6)
    before = rounded.logprobs - rounded.log_tail
    assert (targets.logprobs - targets.log_tail[:, None]).numpy() == pytest.approx(before, abs=1e-6)


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
    torch.testing.assert_close(few.visual_targets.logprobs, whole.visual_targets.logprobs[places])
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


def ragged(name, visual):
    """A record whose images have so many cached rows each, with random distributions."""
    generator = np.random.default_rng(len(visual))
    spans, images, at = [], [], 1
    for number, size in enumerate(visual):
        rows = np.log(generator.dirichlet(np.ones(3), size))
        cached = TopK(
            positions=np.arange(at, at + size, dtype=np.int32),
            token_ids=np.tile(np.arange(10, 12, dtype=np.int32), (size, 1)),
            logprobs=rows[:, :2].astype(np.float32),
            log_tail=rows[:, 2:].astype(np.float32),
            logsumexp=np.zeros((size, 1), np.float32),
        )
        hidden = generator.normal(size=(size, 5)).astype(np.float32)
        images.append(VisualRecord(f"{number:032x}", "0" * 64, at, size, (), cached, hidden, None))
        spans.append(Span(kind="image", start=at, stop=at + size))
        at += size
    ids = np.full(at + 3, 7, np.int32)
    ids[1:at] = LAYOUT.image_token_id
    spans = (Span(kind="prompt", start=0, stop=1), *spans, Span(kind="response", start=at, stop=at + 3))
    bare = topk(np.empty(0), np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    return Record(name, None, ids, spans, bare, tuple(images))


def test_a_subset_of_ragged_images_estimates_the_mean_over_all_rows():
    examples = [Example(ragged("a", [40, 4]), None, 0, 0), Example(ragged("b", [12]), None, 0, 1)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 48, 6, generator=generator)
    head = Head(torch.randn(20, 6, generator=generator), None, 20)
    layout = replace(LAYOUT, vocab_size=20)

    def value(wanted):
        batch = collate(examples, layout, wanted)
        return batch, float(Objective({"visual_kl": 1.0})(hidden, head, batch).raw["visual_kl"])

    whole, mean = value(Wanted({"visual_kl"}))
    assert whole.visual_weights is None
    estimates = []
    for seed in range(300):
        batch, estimate = value(Wanted({"visual_kl"}, visual_positions=6, seed=seed))
        assert counts_of(batch) == counts_of(whole)
        estimates.append(estimate)
    spread = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - mean) < 4 * spread
    assert spread < 0.02 * mean


def test_drawn_ids_estimate_the_teacher_without_bias():
    """The mean over many draws is the teacher; exactly kept ids stay as they are."""
    generator = np.random.default_rng(0)
    teacher = generator.dirichlet(np.ones(8))
    for exact in (0, 3):
        rest = teacher[exact:] / teacher[exact:].sum()
        counts = generator.multinomial(5, rest, size=20_000)
        counts = np.concatenate([np.zeros((20_000, exact), np.int64), counts], axis=1)
        known = np.where((counts > 0) | (np.arange(8) < exact), np.log(teacher), -np.inf)
        masses = np.exp(drawn_masses(known.astype(np.float32), counts.astype(np.int32)).astype(np.float64))
        assert masses.sum(axis=1) == pytest.approx(np.ones(20_000), abs=1e-5)
        assert masses.mean(axis=0) == pytest.approx(teacher, abs=0.005)
        assert masses[:, :exact] == pytest.approx(np.tile(teacher[:exact], (20_000, 1)), abs=1e-6)


def test_drawn_ids_have_no_tail():
    drawn = replace(topk([0], [[5, 6]], [[0.5, 0.25]], [0.25]), counts=np.array([[3, 1]], np.int32))
    targets = to_targets([drawn], 100, Wanted(TERMS))
    assert targets.logprobs.exp().tolist() == [pytest.approx([0.75, 0.25])]
    assert targets.log_tail.tolist() == [-np.inf]


def test_raw_states_are_their_own_factor():
    record = ragged("a", [9])
    example = [Example(record, None)]
    assert collate(example, LAYOUT, Wanted({"relation"})).relations == ()
    (target,) = collate(example, LAYOUT, Wanted({"relation"}, hidden_relation=True)).relations
    states = torch.from_numpy(record.visual[0].hidden)
    hidden = torch.zeros(13, 5)
    hidden[target.rows] = 3 * states
    assert float(relation_distances(hidden, None, [target], "none")) == pytest.approx(0, abs=1e-6)


def test_a_label_outside_the_vocabulary_is_refused(examples, layout):
    record = examples[0].record
    label = int(record.token_ids[record.response.positions[0] + 1])
    few = replace(layout, vocab_size=label)
    with pytest.raises(MismatchError, match=f"sample '{record.sample_id}' holds token id"):
        collate(examples[:1], few, Wanted({"ce"}))
