import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import ConfigError
from student_train.recipe import STAGES
from student_train.sampling import Sampler, choose_positions, make_sampler, pack, stage_seed

KINDS = ["caption", "qa"] * 13
LENGTHS = np.random.default_rng(0).integers(20, 90, 26).astype(np.int32)
CACHE = SimpleNamespace(kinds=KINDS, block_offsets=np.array([0, 6, 14, 26]), num_tokens=LENGTHS)


def sampler(*, batch_size=4, tokens=None, kinds=("qa",), seed=1, window_blocks=2) -> Sampler:
    changes = {"batch_size": batch_size, "tokens_per_batch": tokens, "kinds": kinds}
    stage = STAGES["tiny"]["sft"].model_copy(update=changes)
    return make_sampler(CACHE, stage, seed=seed, window_blocks=window_blocks, where="l1")


def test_golden_order():
    """A change here changes every run that is resumed across versions."""
    assert sampler().batch(0).tolist() == GOLDEN
    assert sampler().batch(5).tolist() == GOLDEN_FIFTH


GOLDEN = [[0, 3], [0, 1], [0, 5], [0, 9]]
GOLDEN_FIFTH = [[1, 15], [1, 23], [1, 13], [1, 11]]


def test_every_epoch_has_every_selected_sample_once():
    entries = np.concatenate([sampler().batch(step) for step in range(13)])
    for epoch in range(4):
        assert sorted(entries[entries[:, 0] == epoch, 1]) == list(range(1, 26, 2))


def test_batches_are_a_function_of_the_step_alone():
    used = sampler()
    later_first = [used.batch(step).tolist() for step in (9, 0, 5, 9)]
    assert later_first == [sampler().batch(step).tolist() for step in (9, 0, 5, 9)]


def test_threads_that_ask_at_once_see_the_same_order():
    def fresh() -> Sampler:
        return sampler(tokens=90)

    steps = list(range(400, -1, -1))  # the first asked for makes every epoch before it
    alone = fresh()
    wanted = [alone.batch(step).tolist() for step in steps]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        shared = fresh()
        with ThreadPoolExecutor(8) as pool:
            found = [batch.tolist() for batch in pool.map(shared.batch, steps)]
    finally:
        sys.setswitchinterval(switch)
    assert found == wanted


def test_seeds_and_epochs_differ():
    assert sampler(seed=1).batch(0).tolist() != sampler(seed=2).batch(0).tolist()
    assert len({stage_seed(0, level, stage) for level in range(5) for stage in range(5)}) == 25
    whole = sampler(batch_size=13)
    assert whole.batch(0)[:, 1].tolist() != whole.batch(1)[:, 1].tolist()


def test_batch_larger_than_the_data_spans_epochs():
    batch = sampler(batch_size=30).batch(0)
    assert np.bincount(batch[:, 0]).tolist() == [13, 13, 4]


def test_kinds_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"wants kinds \['video'\], l1 has \['caption', 'qa'\]"):
        sampler(kinds=("video",))


@pytest.mark.parametrize(
    ("kinds", "found"),
    [([None] * 26, "samples without a kind"), (["qa", None] * 13, "['qa'] and samples without a kind")],
)
def test_kinds_wanted_of_samples_without_any_are_refused_with_what_to_do(kinds, found):
    stage = STAGES["tiny"]["sft"].model_copy(update={"kinds": ("video",)})
    cache = SimpleNamespace(kinds=kinds, block_offsets=CACHE.block_offsets, num_tokens=LENGTHS)
    with pytest.raises(ConfigError) as caught:
        make_sampler(cache, stage, seed=1, window_blocks=2, where="l1")
    cure = "set kinds = [] in the stage, or give samples a kind"
    assert str(caught.value) == f"stage 'sft' wants kinds ['video'], l1 has {found}; {cure}"


def test_positions_are_rising_distinct_and_indexed():
    chosen = choose_positions(36, 8, seed=3, epoch=1, sample=5, image=0)
    assert len(set(chosen.tolist())) == 8
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == choose_positions(36, 8, seed=3, epoch=1, sample=5, image=0).tolist()
    others = [(4, 1, 5, 0), (3, 2, 5, 0), (3, 1, 6, 0), (3, 1, 5, 1)]
    for seed, epoch, sample, image in others:
        other = choose_positions(36, 8, seed=seed, epoch=epoch, sample=sample, image=image)
        assert chosen.tolist() != other.tolist()


def test_every_position_is_chosen_equally_often():
    counts = np.zeros(36)
    for sample in range(4000):
        counts[choose_positions(36, 9, seed=0, epoch=0, sample=sample, image=0)] += 1
    assert abs(counts / 4000 - 0.25).max() < 0.04


def test_all_positions_when_none_or_too_many_are_asked_for():
    assert choose_positions(5, None, seed=0, epoch=0, sample=0, image=0).tolist() == [0, 1, 2, 3, 4]
    assert choose_positions(5, 9, seed=0, epoch=0, sample=0, image=0).tolist() == [0, 1, 2, 3, 4]


def epochs_of(made: Sampler, num: int) -> list[np.ndarray]:
    """The batches of the first epochs."""
    batches, step = [], 0
    while (batch := made.batch(step))[0, 0] < num:
        batches.append(batch)
        step += 1
    return batches


def test_token_batches_hold_the_budget_and_every_sample_once_an_epoch():
    batches = epochs_of(sampler(tokens=200), 3)
    assert all(LENGTHS[batch[:, 1]].sum() <= 200 for batch in batches)
    assert all(len(set(batch[:, 0].tolist())) == 1 for batch in batches)
    entries = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(entries[entries[:, 0] == epoch, 1]) == list(range(1, 26, 2))


def test_token_batches_are_a_function_of_the_step_alone():
    used = sampler(tokens=200)
    found = [used.batch(step).tolist() for step in (7, 0, 3, 7)]
    assert found == [sampler(tokens=200).batch(step).tolist() for step in (7, 0, 3, 7)]
    assert sampler(tokens=200, seed=2).batch(0).tolist() != sampler(tokens=200).batch(0).tolist()


def test_token_batches_pad_less_than_batches_by_size():
    def padding(batches):
        real = sum(LENGTHS[batch[:, 1]].sum() for batch in batches)
        return 1 - real / sum(LENGTHS[batch[:, 1]].max() * len(batch) for batch in batches)

    by_size = [sampler().batch(step) for step in range(13)]
    assert padding(epochs_of(sampler(tokens=200), 4)) < 0.7 * padding(by_size)


def test_steps_of_epochs():
    assert sampler(batch_size=4).steps_of(1) == 3
    assert sampler(batch_size=4).steps_of(2) == 6
    assert sampler(batch_size=100).steps_of(1) == 1
    made = sampler(tokens=200)
    assert made.steps_of(2) == len(epochs_of(made, 2))
    assert 1 <= made.steps_of(0.5) < made.steps_of(1)


def test_a_sample_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match="wants 50 tokens per batch, l1 has a sample of"):
        sampler(tokens=50)


def test_packing_cuts_in_order():
    samples, lengths = np.arange(6), np.array([5, 5, 1, 9, 10, 2], np.int32)
    assert [run.tolist() for run in pack(samples, lengths, 10)] == [[0, 1], [2, 3], [4], [5]]
