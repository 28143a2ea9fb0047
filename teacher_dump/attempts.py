"""Which part was being computed when a process died, so that the next run can isolate the sample.

    zarr/l1/                   the cache
    zarr/l1.attempts/
        00003.json             {"identity": "…", "deaths": 2, "condemned": [a sample and why]}

A file is written before its part is computed and removed when that ended in any way but the death of the
process: a result, an error, Ctrl-C. So a remaining count of deaths was left by a process
that was killed, or that died with its engine. After `CAREFUL_AFTER` deaths in one part the engine is
started in a process of its own, where a sample that kills it can be found (see `teacher_dump.isolate`).
Samples that are found are recorded at once, so that a dump that is killed during the search keeps them.

Nothing here is part of the cache. Removing the directory has every sample tried again.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schemas.base import Frozen
from schemas.manifest import Quarantined
from teacher_dump.quarantine import place_beside

log = logging.getLogger(__name__)

CAREFUL_AFTER = 2
"""Deaths in one part after which its engine runs in a process of its own; one may be a manual `kill`."""


class _Known(Frozen):
    """A part's file."""

    identity: str
    """Hash of the cache's identity."""
    deaths: int = 0
    """Processes that died while they computed the part, the present one included."""
    condemned: tuple[Quarantined, ...] = ()
    """Samples that kill the engine."""


class Attempt:
    """A part that is being computed."""

    def __init__(self, record: "AttemptLog", part: int, condemned: dict[str, Quarantined]) -> None:
        self._record, self._part = record, part
        self.condemned = condemned
        """Samples that killed the engine, in this attempt or an earlier one, by id."""

    def condemn(self, sample: Quarantined) -> None:
        """Record a sample that killed the engine."""
        self.condemned[sample.sample_id] = sample
        self._record.write(self._part, self._record.deaths(self._part), self.condemned)


class AttemptLog:
    """Attempts at the parts of one cache; processes that share the cache share the log."""

    def __init__(self, directory: Path, identity: str) -> None:
        """Open the log.

        Args:
            directory: Where its files are; made when something is written.
            identity: Hash of the cache's identity: files of another identity are ignored.
        """
        self.directory, self._identity = directory, identity

    def deaths(self, part: int) -> int:
        """Processes that died while computing a part, since it was last computed without one."""
        return self._read(part).deaths

    def deadly(self, parts: Iterable[int]) -> list[int]:
        """Those parts whose next attempt needs an engine in a process of its own."""
        return [part for part in parts if self.deaths(part) >= CAREFUL_AFTER]

    @contextmanager
    def attempt(self, part: int) -> Iterator[Attempt]:
        """Count a death until the block exits, by any means."""
        before = self._read(part)
        condemned = {each.sample_id: each for each in before.condemned}
        self.write(part, before.deaths + 1, condemned)
        try:
            yield Attempt(self, part, condemned)
        finally:
            self.write(part, before.deaths, condemned)

    def forget(self, part: int) -> None:
        """Remove what is known of a part: it is sealed."""
        with suppress(OSError):
            self._file(part).unlink(missing_ok=True)

    def tidy(self, sealed: Iterable[int]) -> None:
        """Forget sealed parts, and remove the directory when nothing is left in it."""
        for part in sealed if self.directory.is_dir() else ():
            self.forget(part)
        with suppress(OSError):
            self.directory.rmdir()

    def write(self, part: int, deaths: int, condemned: dict[str, Quarantined]) -> None:
        """Replace a part's file, atomically; without deaths or samples it is removed."""
        if not deaths and not condemned:
            self.forget(part)
            return
        known = _Known(identity=self._identity, deaths=deaths, condemned=tuple(condemned.values()))
        file = self._file(part)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            self.directory.mkdir(exist_ok=True)
            temporary.write_text(known.model_dump_json(), encoding="utf-8")
            temporary.replace(file)
        except OSError as error:  # an actor elsewhere, or a working directory that cannot be written
            log.warning("a sample that kills this process will not be found by the next one: %s", error)

    def _read(self, part: int) -> _Known:
        try:
            found = _Known.model_validate_json(self._file(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return _Known(identity=self._identity)
        return found if found.identity == self._identity else _Known(identity=self._identity)

    def _file(self, part: int) -> Path:
        return self.directory / f"{part:05d}.json"


def attempts_place(out: str) -> Path:
    """The log's directory: beside the cache, in the working directory for one in an object store."""
    return place_beside(out, "attempts").absolute()
