"""Find the sample that kills the engine: start again, retry, bisect, quarantine.

    [a b c d e f g h]   died      started again, tried once more: it may not have been the samples
    [a b c d e f g h]   died      known to hold a killer from here on
    [a b c d]           died      known to hold one, too
    [e f g h]           fine      records
    [a b] fine   [c d]            not tried whole: it must be one of these
    [c]   fine   [d]    died      by itself
    [d]                 died      twice alone: quarantined as `engine-killed`

Half of a group is tried before any half of a half, so whether the engine computes anything at all shows
early: if no sample of a group can be computed, the engine is at fault, and the dump ends.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.errors import CascacheError, ConfigError, EngineError, EngineStopped
from common.record import Record
from schemas.manifest import Quarantined
from teacher_dump.attempts import Attempt
from teacher_dump.prompts import Prepared

Item = Prepared | Quarantined
Result = Record | Quarantined

ENGINE_KILLED = "engine-killed"
"""`Quarantined.reason` of a sample that kills the engine whenever it is computed."""

_DEATHS = 2
"""Times that a group, and then a sample by itself, kills the engine before it is blamed."""

_START_PAUSES_SECONDS = (0, 5, 20)
"""Before each try to start again: a dead process gives its device memory back a little late."""

_MOST_IN_VAIN = 12
"""Deaths over one group, none of whose samples was computed, after which the engine is to blame."""


class _Suspects(NamedTuple):
    """A group that holds a sample which kills the engine."""

    items: Sequence[Prepared]
    deaths: int
    """How many times just this group killed it; 0 for what an innocent half left over."""


class Isolation:
    """Computes groups of samples, and survives the engine's death."""

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], list[Result]],
        restart: Callable[[], None],
        *,
        restarts: int,
        say: Callable[[str], None],
    ) -> None:
        """Start with nothing known.

        Args:
            compute: Results of a group, in order; raises EngineStopped when the engine died.
            restart: Starts the engine again; raises EngineError or ConfigError when it cannot.
            restarts: How many times the engine may be started again.
            say: Takes one line for the user.
        """
        self._compute, self._restart_engine, self._say = compute, restart, say
        self._allowed = self._left = restarts
        self._in_vain, self._lives = 0, False
        self._cause = ""

    def run(self, group: Sequence[Item], attempt: Attempt | None) -> list[Result]:
        """Results of a group, in order; a sample that is to blame has `engine-killed` for a result.

        Args:
            group: Samples with ids of their own.
            attempt: Takes the samples that are to blame.

        Raises:
            EngineStopped: The engine is to blame, or was started again too often.
            EngineError: It does not start again.
        """
        self._in_vain, self._lives = 0, False
        for _ in range(_DEATHS):
            found = self._tried(group)
            if found is not None:
                return found
        results: dict[str, Result] = {}
        self._isolate([each for each in group if isinstance(each, Prepared)], results, attempt)
        return [each if isinstance(each, Quarantined) else results[each.sample_id] for each in group]

    def prepare(self, action: Callable[[], None]) -> None:
        """Run an action that a fresh engine does not need; an engine that died meanwhile is restarted.

        Raises:
            EngineError: It does not start.
        """
        try:
            action()
        except EngineStopped as error:
            self._restart(error, 0)

    def _isolate(
        self, group: Sequence[Prepared], results: dict[str, Result], attempt: Attempt | None
    ) -> None:
        """Add the results of a group that killed the engine."""
        bad = deque([_Suspects(group, _DEATHS)])
        while bad:
            items, deaths = bad.popleft()
            if len(items) == 1:
                self._judge(items[0], deaths, results, attempt)
                continue
            left, right = items[: len(items) // 2], items[len(items) // 2 :]
            if self._survives(left, results):
                bad.append(_Suspects(right, 0))
            else:
                bad.append(_Suspects(left, 1))
                if not self._survives(right, results):
                    bad.append(_Suspects(right, 1))

    def _judge(
        self, item: Prepared, deaths: int, results: dict[str, Result], attempt: Attempt | None
    ) -> None:
        """Add the result of one sample: computed, or condemned when it killed the engine twice by itself."""
        for _ in range(deaths, _DEATHS):
            if self._survives([item], results):
                return
        detail = f"{item.sample_id}: the engine dies whenever this sample is computed: {self._cause}"
        condemned = Quarantined(sample_id=item.sample_id, reason=ENGINE_KILLED, detail=detail)
        results[item.sample_id] = condemned
        if attempt is not None:
            attempt.condemn(condemned)
        self._say(f"{item.sample_id} killed the engine {_DEATHS} times by itself: quarantined")

    def _survives(self, items: Sequence[Prepared], results: dict[str, Result]) -> bool:
        """Whether the engine computes these; if so, their results are added."""
        found = self._tried(items)
        results |= {item.sample_id: each for item, each in zip(items, found or (), strict=False)}
        return found is not None

    def _tried(self, items: Sequence[Item]) -> list[Result] | None:
        """Results in order; None when the engine died of them and was started again."""
        try:
            found = self._compute(items)
        except EngineStopped as error:
            self._restart(error, len(items))
            return None
        self._lives = True
        return found

    def _restart(self, error: EngineStopped, num_samples: int) -> None:
        if not self._allowed:
            raise error
        self._cause = str(error).rpartition("; run ")[0] or str(error)
        self._in_vain += 1
        if not self._left:
            raise EngineStopped(
                f"{self._cause}, after {self._allowed} starts: as many as --max-engine-restarts allows "
                "in one run; the samples found so far are kept: run the same command again to resume"
            ) from error
        if self._in_vain >= _MOST_IN_VAIN and not self._lives:
            raise EngineStopped(
                f"{self._cause}, {self._in_vain} times with no sample computed between them, so none is "
                "to blame; give the engine more room (--max-num-seqs, --max-len, --engine-arg) and run again"
            ) from error
        self._left -= 1
        doing = f"on {num_samples} samples" if num_samples > 1 else "on one sample" if num_samples else "idle"
        self._say(f"{self._cause} ({doing}); restarting it ({self._left} restarts left)")
        self._start()

    def _start(self) -> None:
        last: CascacheError | None = None
        for pause in _START_PAUSES_SECONDS:
            time.sleep(pause)
            try:
                self._restart_engine()
            except (EngineError, ConfigError) as error:
                last = error
            else:
                return
        raise EngineError(
            f"{self._cause}, and it did not start again in {len(_START_PAUSES_SECONDS)} tries: {last}"
        ) from last
