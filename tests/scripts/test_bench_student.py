"""The benchmark of a step, at a size that takes seconds: what it compares is comparable."""

import pytest

from scripts.bench_student import RATIOS, WAYS, Bed, bench_config, measure_steps, measure_wait, step_report
from scripts.bench_student_data import Bench, make
from student_train.plan import make_plan

SMALL = Bench(vocabulary=512, student_width=64, teacher_width=64, layers=1, images=3, kept=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(SMALL, tmp_path_factory.mktemp("bench") / "student")


@pytest.fixture(scope="module")
def config(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench-run")
    return bench_config(out, cache=str(made.cache), student=str(made.student), batch=2, steps=4)


def test_every_way_takes_steps_and_is_compared_at_equal_work(made, config):
    bed = Bed(make_plan(config), str(made.teacher), num_batches=2)
    report = step_report(bed, measure_steps(bed, 1))
    ways = report["ways"]
    assert set(ways) == set(WAYS)
    assert len({way["tokens"] for way in ways.values()}) == 1
    assert ways["sft"]["head_rows"] == ways["cached, response"]["head_rows"]
    assert ways["sft, image rows too"]["head_rows"] == ways["cached, + all image rows"]["head_rows"]
    assert all(report[name] > 0 for name in RATIOS)


def test_the_teacher_in_the_loop_says_what_the_cache_says(made, config):
    bed = Bed(make_plan(config), str(made.teacher), num_batches=1)
    cached, asked = (bed.batch(name, 0) for name in ("cached, + all image rows", "online, + all image rows"))
    asked = bed.ask_teacher(asked)
    for kind in ("response_targets", "visual_targets"):
        ours, theirs = getattr(cached, kind), getattr(asked, kind)
        assert (ours.logprobs - theirs.logprobs).abs().max() < 1e-3
        assert (ours.log_tail - theirs.log_tail).abs().max() < 1e-3


def test_a_run_says_how_long_it_waited(config):
    report = measure_wait(config)
    assert 0 <= report["data_wait_share"] < 1
    assert report["data_wait_steps"] == 3
