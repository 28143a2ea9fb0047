"""A trial draws whole images, and its interval holds the truth about as often as it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.trial import draw_groups, ratio_interval, share_interval

KEYS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(lambda keys: np.array(keys, np.int64))


@given(KEYS, st.integers(1, 80), st.integers(0, 9))
def test_whole_images_are_drawn(keys: np.ndarray, count: int, seed: int):
    chosen, groups = draw_groups(keys, count, seed=seed)
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) >= min(count, len(keys))
    for group in set(groups.tolist()):
        members = chosen[groups == group]
        key = keys[members[0]]
        assert members.tolist() == ([members[0]] if key == 0 else np.flatnonzero(keys == key).tolist())


def test_every_sample_may_be_drawn():
    keys = np.array([0, 0, 0, 5, 5, 6], np.int64)
    seen = [draw_groups(keys, 1, seed=seed)[0].tolist() for seed in range(40)]
    assert {each for chosen in seen for each in chosen} == set(range(6))


def test_the_interval_holds_the_truth_most_of_the_time():
    draw, held, trials = np.random.default_rng(0), 0, 200
    sizes = draw.integers(1, 6, 5000).astype(float)
    costs = 1000 + sizes * draw.gamma(2, 300, 5000)
    truth = costs.sum() / sizes.sum()
    for trial in range(trials):
        some = draw.choice(5000, 40, replace=False)
        found = ratio_interval(costs[some], sizes[some], share=0.01, seed=trial)
        held += found.low <= truth <= found.high
    assert 0.88 * trials <= held <= 0.99 * trials


def test_the_interval_closes_when_everything_was_tried():
    costs, sizes = np.array([3.0, 8.0, 1.0]), np.ones(3)
    found = ratio_interval(costs, sizes, share=1.0, seed=0)
    assert found.low == found.value == found.high == pytest.approx(4)
    wide, narrow = (ratio_interval(costs, sizes, share=share, seed=0) for share in (0.1, 0.9))
    assert wide.high - wide.low > narrow.high - narrow.low > 0


@pytest.mark.parametrize(("bad", "low", "high"), [(0, 0.0, 0.057), (4, 0.025, 0.15), (64, 0.943, 1.0)])
def test_wilson_of_64(bad: int, low: float, high: float):
    found = share_interval(bad, 64)
    assert found == pytest.approx((bad / 64, low, high), abs=0.001)
