"""The order is a pure function, complete, and well mixed."""

import numpy as np
import pytest

from common.cache.order import epoch_order, shuffle_distance


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("sizes", [[], [1], [3, 1, 4, 1, 5, 9, 2, 6]])
def test_every_record_once(sizes, window):
    order = epoch_order(offsets_of(sizes), seed=3, epoch=1, window_blocks=window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_golden_order():
    order = epoch_order(offsets_of([3, 1, 4, 2]), seed=7, epoch=0, window_blocks=2)
    assert order.tolist() == [3, 6, 5, 4, 7, 2, 1, 0, 8, 9]


def test_seeds_and_epochs_differ():
    offsets = offsets_of([10] * 20)
    orders = {
        (s, e): tuple(epoch_order(offsets, seed=s, epoch=e, window_blocks=4))
        for s in range(3)
        for e in range(3)
    }
    assert len(set(orders.values())) == 9


def test_a_window_holds_few_blocks():
    offsets = offsets_of([7] * 30)
    order = epoch_order(offsets, seed=0, epoch=0, window_blocks=5)
    blocks = np.searchsorted(offsets, order, side="right") - 1
    for start in range(0, len(order), 35):
        assert len(set(blocks[start : start + 35].tolist())) == 5


def test_wider_windows_mix_better():
    offsets = offsets_of([20] * 64)
    groups = np.arange(64 * 20) // 20
    scores = [shuffle_distance(groups, offsets, window_blocks=w, batch=32) for w in (1, 4, 16, 64)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == pytest.approx(1.0, abs=0.1)
    assert scores[0] > 3
