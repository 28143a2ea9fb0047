"""A picture that kills the engine's process costs its own samples and no other: by the command, for real."""

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
    killed_while_bisecting,
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


def test_a_poison_that_samples_share_and_one_in_another_part_cost_those_samples(
    model: Path, healthy: Path, tmp_path: Path
):
    """The driver is killed while it searches, too; what it had found and sealed is kept."""
    data = write_poisoned(tmp_path / "data", (0, 1, 9), (14,))
    arguments = command(model, data, tmp_path / "l1", "--engine-process", "own")
    killed = killed_while_bisecting(arguments, "abort", tmp_path / "killed")
    assert killed.status < 0
    ended = run(arguments, "abort", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "starting it again" in ended.said
    assert "4 samples quarantined" in ended.said
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {0, 1, 9, 14})


def test_an_engine_in_the_drivers_process_is_moved_out_after_two_deaths(
    model: Path, healthy: Path, tmp_path: Path
):
    arguments = command(model, write_poisoned(tmp_path / "data", (14,)), tmp_path / "l1")
    for number in range(2):
        assert run(arguments, "abort", tmp_path / f"said{number}").status == -6, "the poison is real"
    ended = run(arguments, "abort", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "the engine gets a process of its own" in ended.said
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {14})


def test_an_engine_that_breaks_in_the_drivers_process_goes_on_outside_it(
    model: Path, healthy: Path, tmp_path: Path
):
    arguments = command(model, write_poisoned(tmp_path / "data", (14,)), tmp_path / "l1")
    ended = run(arguments, "raise", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "starting it again" in ended.said
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {14})


def test_rays_actors_outlive_poison(model: Path, healthy: Path, tmp_path: Path):
    arguments = command(
        model, write_poisoned(tmp_path / "data", (3,), (14,)), tmp_path / "l1", "--workers", "2"
    )
    ended = run(arguments, "abort", tmp_path / "said")
    assert ended.status == 0, ended.said
    assert "2 samples quarantined" in ended.said
    assert_only_poison_is_missing(tmp_path / "l1", healthy, {3, 14})


def test_the_teachers_own_answers_outlive_poison(model: Path, tmp_path: Path):
    answers = ["--responses", "teacher", "--max-new-tokens", "4", "--limit", "12"]
    file = write_poisoned(tmp_path / "data", (3,))
    whole = run(command(model, file, tmp_path / "whole", *answers), "", tmp_path / "healthy")
    assert whole.status == 0, whole.said
    arguments = command(model, file, tmp_path / "l1", *answers, "--engine-process", "own")
    ended = run(arguments, "abort", tmp_path / "said")
    assert ended.status == 0, ended.said
    with CacheReader(str(tmp_path / "l1")) as found, CacheReader(str(tmp_path / "whole")) as wanted:
        assert set(found.sample_ids) == set(wanted.sample_ids) - {"s003"}
        for name in found.sample_ids:
            ours, theirs = found.read_record(name), wanted.read_record(name)
            assert np.array_equal(ours.token_ids, theirs.token_ids)
            assert_close(ours.response, theirs.response)


def test_an_engine_that_dies_of_every_picture_ends_the_dump_in_words(model: Path, tmp_path: Path):
    data = write_poisoned(tmp_path / "data")
    arguments = command(model, data, tmp_path / "l1", "--engine-process", "own", "--max-engine-restarts", "2")
    ended = run(arguments, "all", tmp_path / "said")
    assert ended.status == 2
    assert "after 2 starts: as many as --max-engine-restarts allows" in ended.said
    assert "Traceback" not in ended.said
