import time

import pytest
import torch

from common.cache.reader import CacheReader
from common.chat import load_processor
from common.data.source import open_source
from common.errors import ConfigError
from student_train.collate import Wanted
from student_train.losses.terms import TERMS
from student_train.pixels import PixelLoader
from student_train.recipe import STAGES
from student_train.sampling import Sampler
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
        sampler = Sampler(reader, stage, seed=4, window_blocks=2, where="l1")
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_global_batches_do_not_depend_on_the_number_of_processes(make, world_size, micro_batch):
    whole = [sorted(step.batches[0].sample_ids) for step in make().read_steps(0, 3)]
    shares = [make(Share(rank, world_size, micro_batch)) for rank in range(world_size)]
    for number, step in enumerate(zip(*(share.read_steps(0, 3) for share in shares), strict=True)):
        ids = [name for part in step for batch in part.batches for name in batch.sample_ids]
        assert sorted(ids) == whole[number]
        assert len({len(part.batches) for part in step}) == 1
        assert all(len(b.sample_ids) <= (micro_batch or 6) for part in step for b in part.batches)


def test_batch_that_does_not_divide_is_refused(make):
    with pytest.raises(ConfigError, match="global batch of 6 samples does not divide among 4 processes"):
        next(make(Share(0, 4)).read_steps(0, 1))


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
