"""Parts dumped side by side by Ray's actors: nothing is lost with one of them, and no value differs."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.processor import load_processor
from common.template_fingerprint import chat_template_fingerprint
from teacher_dump.distributed import bind_cores
from tests import tiny_families
from tests.teacher_dump.dump_job import work_of
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.test_dump import assert_same
from tests.teacher_dump.test_engine_death import check_same


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tiny_families.build("llava_siglip", tiny_dir)
    return run_cases(
        "ray_job", tiny_dir, tmp_path_factory.mktemp("ray"), ["alone", "lost_actor", "own_process"]
    )


@pytest.mark.slow
def test_a_lost_actor_loses_nothing(answers: Callable[[str], Any], tiny_dir: Path):
    answer, work = answers("lost_actor"), work_of(tiny_dir)
    assert answer["status"] == 0, answer["said"]
    assert answer["actors"] >= 1
    assert answer["sealed"] < 6, "the actor was killed after the last part"
    assert answers("alone")[0] == 0, answers("alone")[1]
    assert verify(str(work / "lost")).ok
    with CacheReader(str(work / "lost")) as found, CacheReader(str(work / "alone")) as wanted:
        assert found.complete
        assert list(found.sample_ids) == list(wanted.sample_ids)
        for name in wanted.sample_ids:
            assert_same(found.read_record(name), wanted.read_record(name))
        own = chat_template_fingerprint(load_processor(str(tiny_dir / "llava_siglip")))
        assert found.manifest.fingerprints.chat_template != own, (
            "actors read the --chat-template of the driver"
        )


@pytest.mark.slow
def test_an_engine_process_of_an_actor_captures_the_same(answers: Callable[[str], Any], tiny_dir: Path):
    status, heard = answers("own_process")
    assert status == 0, heard
    work = work_of(tiny_dir)
    check_same(work / "ray-own", work / "alone")


def _bound(ready: Any, go: Any, found: Any) -> None:
    held = bind_cores(1)
    found.put((sorted(os.sched_getaffinity(0)), os.environ["VLLM_CPU_OMP_THREADS_BIND"]))
    ready.release()
    go.wait()
    held.close()


def test_actors_hold_cores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # not the locks of other dumps on this machine
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    ready, go, found = context.Semaphore(0), context.Event(), context.Queue()
    actors = [context.Process(target=_bound, args=(ready, go, found)) for _ in cores]
    for actor in actors:
        actor.start()
    for _ in actors:
        assert ready.acquire(timeout=60)
    answers = [found.get(timeout=10) for _ in actors]
    go.set()
    for actor in actors:
        actor.join()
    assert sorted(core for held, _ in answers for core in held) == cores
    assert all(bind == ",".join(map(str, held)) for held, bind in answers)
