"""A picture that kills the engine's process costs its own samples and no other: by the command, for real."""

import signal
from pathlib import Path

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.record import TopK
from tests import tiny_families
from tests.teacher_dump.poison_job import (
    NUM_SAMPLES,
    command,
    killed_after_a_verdict,
    run,
    write_poisoned,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Path:
    return tiny_families.build("llava_siglip", tiny_dir)


@pytest.fixture(scope="module")
def healthy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the data with no poison in it."""
    root = tmp_path_factory.mktemp("healthy")
    out = root / "l1"
    ended = run(command(model, write_poisoned(root / "data"), out), "", root / "said")
    assert ended.status == 0, ended.said
    return out


def assert_close(found: TopK | None, wanted: TopK | None) -> None:
    """Equal up to the rounding of another batch."""
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert np.array_equal(found.positions, wanted.positions)
        assert np.array_equal(np.sort(found.token_ids), np.sort(wanted.token_ids))
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
        np.testing.assert_allclose(found.logsumexp, wanted.logsumexp, atol=1e-4)


def assert_only_poison_is_missing(out: Path, healthy: Path, poisoned: set[int]) -> None:
    """Complete and sound, poisonous samples quarantined, all others as without poison."""
    names = {f"s{number:03}" for number in poisoned}
    report = verify(str(out))
    assert report.ok, report
    assert not Path(f"{out}.attempts").exists(), "nothing is left of the attempts"
    with CacheReader(str(out)) as found, CacheReader(str(healthy)) as wanted:
        assert found.complete
        assert set(found.sample_ids) == set(wanted.sample_ids) - names
        assert len(wanted.sample_ids) == NUM_SAMPLES
        lost = [each for seal in found.seals.values() for each in seal.quarantined]
        assert {each.sample_id for each in lost} == names
        assert {each.reason for each in lost} == {"engine-killed"}
        assert all("the engine dies whenever this sample is computed" in each.detail for each in lost)
        for name in found.sample_ids:
            ours, theirs = found.read_record(name), wanted.read_record(name)
            assert np.array_equal(ours.token_ids, theirs.token_ids)
            assert_close(ours.response, theirs.response)
            for image, whole in zip(ours.visual, theirs.visual, strict=True):
                assert image.image_sha256 == whole.image_sha256
                assert_close(image.topk, whole.topk)
                np.testing.assert_allclose(
                    image.factor @ image.factor.T, whole.factor @ whole.factor.T, rtol=1e-2, atol=1e-3
                )


def test_poison_costs_its_own_samples_and_no_other(model: Path, healthy: Path, tmp_path: Path):
    """Two samples of one poisonous picture and a third in another part.

    The engine takes the driver along twice and gets a process of its own; then the driver is killed while
    it searches. The same command each time.
    """
    data = write_poisoned(tmp_path / "data", (0, 9), (14,))
    arguments = command(model, data, tmp_path / "l1")
    for number in range(2):
        assert run(arguments, "abort", tmp_path / f"aborted{number}").status == -signal.SIGABRT
    killed = killed_after_a_verdict(arguments, "abort", tmp_path / "killed")
    assert killed.status == -signal.SIGKILL
    assert "the engine gets a process of its own" in killed.said
    ended = run(arguments, "abort", tmp_path / "ended")
    assert ended.status == 0, ended.said
    assert "3 samples quarantined" in ended.said
    found = [line.split()[1] for line in ended.said.splitlines() if line.endswith("itself: quarantined")]
    assert len(found) == 2, "what the killed driver had found is not searched for again"
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {0, 9, 14})


def test_rays_actors_outlive_poison(model: Path, healthy: Path, tmp_path: Path):
    data = write_poisoned(tmp_path / "data", (14,))
    ended = run(command(model, data, tmp_path / "l1", "--workers", "2", group=2), "abort", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "1 samples quarantined" in ended.said
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {14})


def test_the_teachers_own_answers_outlive_an_engine_that_breaks(model: Path, tmp_path: Path):
    """A Python error in the worker, which shares the driver's process."""
    answers = ["--responses", "teacher", "--max-new-tokens", "4", "--limit", "12"]
    file = write_poisoned(tmp_path / "data", (3,))
    whole = run(command(model, file, tmp_path / "whole", *answers), "", tmp_path / "healthy")
    assert whole.status == 0, whole.said
    ended = run(command(model, file, tmp_path / "l1", *answers), "raise", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "poisonous picture" in ended.said
    with CacheReader(str(tmp_path / "l1")) as found, CacheReader(str(tmp_path / "whole")) as wanted:
        assert set(found.sample_ids) == set(wanted.sample_ids) - {"s003"}
        for name in found.sample_ids:
            ours, theirs = found.read_record(name), wanted.read_record(name)
            assert np.array_equal(ours.token_ids, theirs.token_ids)
            assert_close(ours.response, theirs.response)


def test_an_engine_that_dies_of_every_picture_ends_the_dump_in_words(model: Path, tmp_path: Path):
    data = write_poisoned(tmp_path / "data")
    own = ["--engine-process", "own", "--max-engine-restarts", "1"]
    ended = run(command(model, data, tmp_path / "l1", *own), "all", tmp_path / "said")
    assert ended.status == 2
    assert "after 1 starts: as many as --max-engine-restarts allows" in ended.said
    assert "Traceback" not in ended.said
