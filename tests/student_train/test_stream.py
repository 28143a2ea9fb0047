import time

import pytest
import torch

from common.cache.reader import CacheReader
from common.data.open import open_source
from common.processor import load_processor
from student_train.collate import Wanted
from student_train.losses.terms import TERMS
from student_train.pixels import PixelLoader
from student_train.recipe import STAGES
from student_train.sampling import make_sampler
from student_train.stream import RecordSource, Share, Stream, input_layout
from tests.student_train.conftest import STUDENT

STEPS = 7


@pytest.fixture(scope="module")
def make(cache, shapes):
    processor = load_processor(STUDENT)
    reader = CacheReader(str(cache))
    pixels = PixelLoader(open_source(str(shapes)), processor, keep_bytes=1 << 24)
    layout = input_layout(processor, 3, token_types=False, vocab_size=reader.manifest.vocab_size)

    def build(share=None, *, batch_size=6, visual=None, first_only=False):
        changes = {"batch_size": batch_size, "kinds": ()}
        stage = STAGES["tiny"]["dft"].model_copy(update=changes)
        sampler = make_sampler(reader, stage, seed=4, window_blocks=2, where="l1")
        return Stream(
            RecordSource(reader, keep_blocks=4),
            pixels,
            sampler,
            layout,
            Wanted(TERMS, visual_positions=visual, seed=sampler.seed),
            share=share or Share(),
            workers=2,
            prefetch=3,
            first_batch_only=first_only,
        )

    return build


def tensors(step):
    found = []
    for batch in step.batches:
        found += [batch.response_rows, batch.response_labels, batch.visual_rows, *batch.inputs.values()]
        found += [batch.response_targets.logprobs, batch.visual_targets.token_ids]
        found += [each.factor for each in batch.relations]
    return found


def test_restores_at_every_cursor(make):
    """A stream that starts at step s is the rest of one that started at 0, tensor for tensor."""
    whole = list(make(visual=5).read_steps(0, STEPS))
    for first in range(STEPS + 1):
        rest = list(make(visual=5).read_steps(first, STEPS))
        assert [step.step for step in rest] == list(range(first, STEPS))
        for ours, theirs in zip(rest, whole[first:], strict=True):
            assert [b.sample_ids for b in ours.batches] == [b.sample_ids for b in theirs.batches]
            assert all(a.equal(b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


def test_threads_change_nothing(make):
    ahead = list(make().read_steps(0, STEPS))
    alone = [make().read_step(step) for step in range(STEPS)]
    for ours, theirs in zip(ahead, alone, strict=True):
        assert all(a.equal(b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_global_batches_do_not_depend_on_the_number_of_processes(make, world_size, micro_batch):
    """Also where the six samples do not divide: idle processes see a batch without targets."""
    whole = [step.batches[0] for step in make().read_steps(0, 3)]
    shares = [make(Share(rank, world_size, micro_batch)) for rank in range(world_size)]
    for number, step in enumerate(zip(*(share.read_steps(0, 3) for share in shares), strict=True)):
        batches = [batch for part in step for batch in part.batches]
        ids = [name for batch in batches if batch.num_tokens for name in batch.sample_ids]
        assert sorted(ids) == sorted(whole[number].sample_ids)
        assert sum(len(batch.response_rows) for batch in batches) == len(whole[number].response_rows)
        assert len({len(part.batches) for part in step}) == 1
        assert all(len(batch.sample_ids) <= (micro_batch or 6) for batch in batches)


def test_micro_batches_put_like_lengths_together(make):
    batches = make(Share(micro_batch=2)).read_step(0).batches
    longest = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert longest == sorted(longest)


def test_one_batch_can_be_repeated(make):
    steps = list(make(first_only=True).read_steps(0, 3))
    assert len({step.batches[0].sample_ids for step in steps}) == 1


def test_records_by_index_are_the_caches(cache):
    reader = CacheReader(str(cache))
    source = RecordSource(reader, keep_blocks=1)
    for index in (0, reader.num_samples - 1, 3, 20, 19):
        assert source.record(index).sample_id == reader.sample_ids[index]


def test_leaving_early_stops_the_threads(make):
    steps = make().read_steps(0, 10_000)
    next(steps)
    began = time.perf_counter()
    steps.close()
    assert time.perf_counter() - began < 5


def test_errors_of_the_threads_reach_the_caller(make):
    stream = make()
    stream._layout = None
    with pytest.raises(AttributeError):
        next(stream.read_steps(0, 2))


def test_every_batch_is_on_the_cpu_and_typed(make):
    batch = make().read_step(0).batches[0]
    assert batch.inputs["input_ids"].dtype == batch.response_rows.dtype == torch.int64
    assert batch.response_targets.logprobs.dtype == torch.float32
