"""An engine in a process of its own gives what one in the driver's gives; its death is one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_families
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.process_job import FAMILY


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tiny_families.build(FAMILY, tiny_dir)
    tiny_families.build(FAMILY, tiny_dir / "padded", vocab=2048)
    return run_cases("process_job", tiny_dir, tmp_path_factory.mktemp("process"), ["same", "own", "padded"])


def assert_equal_arrays(found: Any, wanted: Any) -> None:
    """Bit for bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert np.array_equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal_arrays(found[key], wanted[key])
    elif hasattr(wanted, "__slots__"):
        for name in wanted.__slots__:
            assert_equal_arrays(getattr(found, name), getattr(wanted, name))
    elif isinstance(wanted, tuple | list):
        for ours, theirs in zip(found, wanted, strict=True):
            assert_equal_arrays(ours, theirs)
    else:
        assert found == wanted


@pytest.mark.slow
def test_an_engine_process_captures_the_same_bits_of_one_sample(answers: Callable[[str], Any]):
    found, wanted = answers("own")["alone"], answers("same")["alone"]
    assert all(each.problem is None for each in wanted)
    assert_equal_arrays(found, wanted)


@pytest.mark.slow
def test_an_engine_process_captures_samples_together_to_rounding(answers: Callable[[str], Any]):
    """Batches may differ: they depend on when samples arrive there."""
    found, wanted = answers("own")["together"], answers("same")["together"]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.problem is theirs.problem is None
        rows = [(ours.response, theirs.response)]
        rows += [(ours.images[index].rows, theirs.images[index].rows) for index in theirs.images]
        for mine, other in rows:
            np.testing.assert_allclose(mine.logsumexp, other.logsumexp, atol=4e-5)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=4e-5)
            assert (mine.token_ids == other.token_ids).mean() > 0.999
        for index in theirs.images:
            np.testing.assert_allclose(
                ours.images[index].hidden, theirs.images[index].hidden, atol=1e-5, rtol=1e-4
            )


@pytest.mark.slow
def test_the_engine_process_is_spawned(answers: Callable[[str], Any]):
    assert any("multiprocessing.spawn" in each for each in answers("own")["titles"])


@pytest.mark.slow
def test_what_vllm_refuses_of_one_sample_leaves_the_engine_alive(answers: Callable[[str], Any]):
    answer = answers("own")
    assert answer["too long"].reason == "engine-refused"
    assert "1024" in answer["too long"].problem or "1025" in answer["too long"].problem
    assert answer["no room"].reason == "engine-refused"
    assert "max_tokens" in answer["no room"].problem
    assert answer["after"].problem is None


@pytest.mark.slow
def test_a_killed_worker_ends_in_one_line_and_leaves_no_process(answers: Callable[[str], Any]):
    answer = answers("own")
    assert answer["killed"].startswith("EngineStopped: vLLM stopped while computing: ")
    assert "VllmWorker-0 died" in answer["killed"]
    assert "run the same command again" in answer["killed"]
    assert "\n" not in answer["killed"]
    assert answer["left"] == []


@pytest.mark.slow
def test_many_padding_rows_are_never_drawn(answers: Callable[[str], Any]):
    answer = answers("padded")
    drawn = [np.concatenate([each.token_ids for each in answer[name]]) for name in ("answers", "unmasked")]
    assert all(each.problem is None for each in answer["answers"])
    assert len(drawn[0]) >= 50
    assert (drawn[0] < answer["size"]).all()
    assert (drawn[1] >= answer["size"]).any(), "this teacher likes its padding rows, when it may have them"
    assert all(list(each) == [7] for each in answer["told"])
