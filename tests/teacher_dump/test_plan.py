"""The plan keeps an image's samples together, loses none, and cuts the same parts every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.plan import choose_part_samples, group_by_image, make_plan

KEYS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(lambda keys: np.array(keys, np.int64))


def test_an_image_s_samples_stand_where_its_first_one_stood():
    keys = np.array([7, 3, 7, 0, 3, 0], np.int64)
    assert group_by_image(keys).tolist() == [0, 2, 1, 4, 3, 5]


@given(KEYS)
def test_order_is_a_permutation_with_images_together(keys: np.ndarray):
    order = group_by_image(keys)
    assert sorted(order.tolist()) == list(range(len(keys)))
    for key in set(keys.tolist()) - {0}:
        places = np.flatnonzero(keys[order] == key)
        assert places[-1] - places[0] == len(places) - 1
        assert (np.diff(order[places]) > 0).all()


@given(KEYS, st.integers(1, 9))
def test_parts_cover_the_plan_once(keys: np.ndarray, part_samples: int):
    plan = make_plan(keys, part_samples=part_samples, store="factor")
    parts = plan.todo(frozenset())
    assert [part.index for part in parts] == list(range(plan.num_parts))
    assert np.concatenate([part.samples for part in parts]).tolist() == plan.order.tolist()
    assert [part.first_sample for part in parts] == [part.index * part_samples for part in parts]
    assert all(len(part.samples) == part_samples for part in parts[:-1])


@given(KEYS, st.integers(0, 99), st.integers(1, 60))
def test_a_shuffled_plan_takes_a_random_share_and_keeps_images_together(
    keys: np.ndarray, seed: int, limit: int
):
    plan, again = (
        make_plan(keys, part_samples=4, store="factor", limit=limit, shuffle_seed=seed) for _ in range(2)
    )
    assert plan.order.tolist() == again.order.tolist()
    assert len(set(plan.order.tolist())) == min(limit, len(keys))
    shown = keys[plan.order]
    for key in set(shown.tolist()) - {0}:
        places = np.flatnonzero(shown == key)
        assert places[-1] - places[0] == len(places) - 1


def test_another_seed_is_another_order():
    keys = np.zeros(100, np.int64)
    orders = [
        make_plan(keys, part_samples=9, store="none", shuffle_seed=seed).order.tolist() for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))


def test_sealed_parts_are_not_done_again():
    plan = make_plan(np.zeros(10, np.int64), part_samples=3, store="factor")
    assert [part.index for part in plan.todo(frozenset({0, 2}))] == [1, 3]


@pytest.mark.parametrize(
    ("samples", "store", "wanted"),
    [(3, "factor", 32), (800, "factor", 100), (665_000, "factor", 1024), (665_000, "hidden", 128)],
)
def test_parts_grow_with_the_data_and_stay_in_memory(samples: int, store: str, wanted: int):
    assert choose_part_samples(samples, store) == wanted
