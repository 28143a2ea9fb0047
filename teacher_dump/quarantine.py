"""Samples that have no record: written down with their reason, and limited in number."""

import json
import logging
from pathlib import Path

from common.errors import DataError
from schemas.manifest import PartSeal, Quarantined
from teacher_dump.config import DumpConfig

log = logging.getLogger(__name__)


def place_beside(out: str, suffix: str) -> Path:
    """Path of what is written beside a cache: in the working directory for one in an object store."""
    place = out.rstrip("/")
    return Path(f"{place.rpartition('/')[2] if '://' in place else place}.{suffix}")


class QuarantineLog:
    """`<out>.quarantine.jsonl`: one line per sample that has no record, and the limit on them.

    A convenience: the seals hold the same. For a cache in an object store it lies in the working directory.
    """

    def __init__(self, config: DumpConfig, num_samples: int, sealed: list[PartSeal]) -> None:
        self.path = place_beside(config.out, "quarantine.jsonl")
        self.count = 0
        self._allowed = config.max_quarantine * num_samples
        self._share, self._num_samples = config.max_quarantine, num_samples
        self._pending = 0
        try:
            self.path.unlink(missing_ok=True)
            self._lost = False
        except OSError as error:  # a finished level may be on a read-only mount
            log.warning("%s cannot be written (%s); the seals hold the same", self.path, error)
            self._lost = True
        for seal in sealed:
            self.add(seal)

    def check(self, quarantined: list[Quarantined]) -> None:
        """Refuse to seal a part that would exceed the limit.

        Raises:
            DataError: With the reasons, counted.
        """
        self._pending += len(quarantined)
        if self._pending > self._allowed:
            reasons: dict[str, int] = {}
            for each in quarantined:
                reasons[each.reason] = reasons.get(each.reason, 0) + 1
            counted = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
            raise DataError(
                f"{self._pending} of {self._num_samples} samples cannot be used, --max-quarantine "
                f"allows a share of {self._share:g} (this part: {counted}; first: {quarantined[0].detail}); "
                "fix them or raise it",
                reason="quarantine",
            )

    def add(self, seal: PartSeal) -> None:
        """Write down a sealed part's samples."""
        self.count += len(seal.quarantined)
        self._pending = max(self._pending, self.count)
        if seal.quarantined and not self._lost:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"part": seal.part, **each.model_dump()}) + "\n" for each in seal.quarantined
                )
