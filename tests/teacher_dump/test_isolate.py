"""A sample that kills the engine is found in few deaths, whatever is around it; the others are computed."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from common.chat import Prompt
from common.errors import EngineError, EngineStopped
from common.record import Record, TopK
from schemas.manifest import Quarantined
from teacher_dump import isolate
from teacher_dump.attempts import AttemptLog
from teacher_dump.isolate import ENGINE_KILLED, Isolation, Item, Result
from teacher_dump.prompts import Prepared

NOTHING = np.empty(0, np.int32)


def sample(name: str) -> Prepared:
    prompt = Prompt(name, NOTHING, NOTHING, (), ())
    return Prepared(name, None, prompt, (), ())


def record(name: str) -> Record:
    floats = np.empty((0, 1), np.float32)
    rows = TopK(NOTHING, np.empty((0, 1), np.int32), floats, floats, floats)
    return Record(name, None, NOTHING, (), rows, ())


class Machine:
    """Dies of certain samples, and of anything while it is dead."""

    def __init__(self, killers: set[str], *, transient: int = 0, starts: bool = True) -> None:
        self.killers, self.transient, self.starts = killers, transient, starts
        self.alive = True
        self.deaths = 0
        self.said: list[str] = []
        self.computed: list[str] = []

    def compute(self, group: Sequence[Item]) -> list[Result]:
        assert self.alive, "nothing is asked of a dead engine"
        names = {each.sample_id for each in group if isinstance(each, Prepared)}
        if names & self.killers or (names and self.transient):
            self.alive = False
            self.deaths += 1
            self.transient = max(0, self.transient - 1)
            raise EngineStopped(
                "vLLM stopped while computing: a signal; run the same command again to resume"
            )
        self.computed += sorted(names)
        return [each if isinstance(each, Quarantined) else record(each.sample_id) for each in group]

    def restart(self) -> None:
        if not self.starts:
            raise EngineError("vLLM could not start: out of memory")
        self.alive = True

    def isolation(self, restarts: int = 1000) -> Isolation:
        return Isolation(self.compute, self.restart, restarts=restarts, say=self.said.append)


def names_of(results: list[Result], kind: type) -> list[str]:
    return [each.sample_id for each in results if isinstance(each, kind)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 64])
def test_each_single_killer_is_found_in_few_deaths(size: int):
    group = [sample(f"s{index}") for index in range(size)]
    for place in range(size):
        machine = Machine({f"s{place}"})
        results = machine.isolation().run(group, None)
        assert names_of(results, Quarantined) == [f"s{place}"]
        assert [each.sample_id for each in results] == [each.sample_id for each in group]
        assert machine.deaths <= 2 + math.ceil(math.log2(size)) + (size > 1)
        assert len(machine.computed) == size - 1, "healthy samples are computed once"


@pytest.mark.parametrize("seed", range(40))
def test_any_killers_among_healthy_samples_are_found(seed: int):
    draw = np.random.default_rng(seed)
    size = int(draw.integers(2, 65))
    killers = {
        f"s{each}" for each in draw.choice(size, int(draw.integers(1, max(2, size // 10))), replace=False)
    }
    group: list[Item] = [sample(f"s{index}") for index in range(size)]
    group.insert(1, Quarantined(sample_id="torn", reason="image-unreadable", detail="torn"))
    machine = Machine(killers)
    results = machine.isolation().run(group, None)
    assert [each.sample_id for each in results] == [each.sample_id for each in group]
    found = {each.sample_id: each for each in results if isinstance(each, Quarantined)}
    assert found.pop("torn").reason == "image-unreadable"
    assert set(found) == killers
    assert {each.reason for each in found.values()} == {ENGINE_KILLED}
    assert all("a signal" in each.detail for each in found.values())
    assert machine.alive


def test_one_death_of_nobodys_doing_costs_nobody():
    machine = Machine(set(), transient=1)
    results = machine.isolation().run([sample(f"s{index}") for index in range(8)], None)
    assert len(names_of(results, Record)) == 8
    assert len(machine.said) == 1


def test_an_engine_that_dies_of_everything_ends_the_dump():
    machine = Machine(set(), transient=10_000)
    with pytest.raises(EngineStopped, match="no sample computed between them, so none is to blame"):
        machine.isolation().run([sample(f"s{index}") for index in range(64)], None)
    assert machine.deaths <= isolate._MOST_IN_VAIN


def test_an_engine_that_does_not_start_again_ends_the_dump(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isolate, "_START_PAUSES_SECONDS", (0, 0, 0))
    machine = Machine({"s0"}, starts=False)
    with pytest.raises(
        EngineError, match="did not start again in 3 tries: vLLM could not start: out of memory"
    ):
        machine.isolation().run([sample("s0"), sample("s1")], None)


def test_restarts_are_bounded_and_none_can_be_had():
    machine = Machine({"s3"})
    with pytest.raises(EngineStopped, match="after 4 starts: as many as --max-engine-restarts allows"):
        machine.isolation(restarts=4).run([sample(f"s{index}") for index in range(64)], None)
    machine = Machine({"s3"})
    with pytest.raises(EngineStopped, match="a signal; run the same command again"):
        machine.isolation(restarts=0).run([sample("s3")], None)
    assert machine.deaths == 1


def test_killers_are_written_down_as_they_are_found(tmp_path):
    """Stopped after the first of two, the next run knows it."""
    log = AttemptLog(tmp_path / "l1.attempts", "identity")
    group = [sample(f"s{index}") for index in range(4)]
    machine = Machine({"s0", "s3"})
    with pytest.raises(EngineStopped), log.attempt(7) as attempt:
        machine.isolation(restarts=6).run(group, attempt)
    with log.attempt(7) as attempt:
        assert set(attempt.condemned) == {"s0"}
    with AttemptLog(log.directory, "another").attempt(7) as attempt:
        assert not attempt.condemned, "a cache of another identity has other samples"


def test_an_attempt_counts_only_the_death_of_its_process(tmp_path):
    log = AttemptLog(tmp_path / "l1.attempts", "identity")
    with log.attempt(0):
        assert log.deaths(0) == 1
        assert AttemptLog(log.directory, "another").deaths(0) == 0
    assert log.deaths(0) == 0
    with pytest.raises(KeyboardInterrupt), log.attempt(0):
        raise KeyboardInterrupt
    assert log.deaths(0) == 0
    assert not list(log.directory.iterdir())
    log.tidy([])
    assert not log.directory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": "identity", "deaths": "many"}'])
def test_a_torn_record_counts_for_nothing(damage: str, tmp_path):
    log = AttemptLog(tmp_path / "l1.attempts", "identity")
    log.directory.mkdir()
    (log.directory / "00003.json").write_text(damage)
    assert log.deaths(3) == 0
    with log.attempt(3) as attempt:
        assert not attempt.condemned


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "l1.attempts").write_text("in the way")
    with AttemptLog(tmp_path / "l1.attempts", "identity").attempt(0):
        pass
    assert "will not be found by the next one" in caplog.text
