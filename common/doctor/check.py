"""One check of `cascache doctor`: what was found, what was wanted, and how to fix it.

    child process ──one JSON line per check──> parent ──row by row──> table, or one document

A check that warns or fails always has a cure; one that is skipped has the reason.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

Status = Literal["pass", "warn", "fail", "skip"]
Values = dict[str, Any]

CHECKS: Final[dict[str, tuple[str, ...]]] = {
    "host": (
        "versions",
        "packages",
        "devices",
        "memory",
        "shm",
        "disk",
        "hub-cache",
        "open-files",
        "cores",
        "start-method",
        "environment",
        "hub",
    ),
    "prompts": ("data", "template", "images"),
    "teacher": ("engine", "capture-cost", "throughput", "whole-data", "agreement"),
    "student": ("fit", "losses", "step"),
}
"""Every check by the part that runs it, in order."""


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check."""

    name: str
    """Its name, one of `CHECKS`."""
    status: Status
    """`pass`; `warn`: works, with a drawback; `fail`: would not work; `skip`: could not be checked."""
    found: str
    """What is there, in one line."""
    wanted: str = ""
    """What would pass."""
    cure: str = ""
    """What to do about it."""
    values: Values = field(default_factory=dict)
    """The measurements behind it, as JSON types; units are part of the names."""
    seconds: float = 0.0
    """Time it took."""

    def __post_init__(self) -> None:
        if self.status in ("warn", "fail") and not self.cure:
            raise ValueError(f"check {self.name} is a {self.status} without a cure: {self.found}")

    def to_json(self) -> Values:
        """As JSON types."""
        return asdict(self)


def from_json(found: Values) -> Check:
    """The inverse of `Check.to_json`; unknown fields are ignored."""
    known = {each.name for each in fields(Check)}
    return Check(**{name: value for name, value in found.items() if name in known})


def failure(name: str, message: str) -> Check:
    """A failed check from an error message, whose last clause after a semicolon is its cure."""
    what, _, cure = message.rpartition("; ")
    return Check(name, "fail", what or message, cure=cure if what else "see the message")


def dump_line(check: Check) -> str:
    """One line of JSON."""
    return json.dumps({"check": check.to_json()})


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found and wanted, before it is judged."""

    name: str
    """The check."""
    found: str
    """As in `Check`."""
    wanted: str = ""
    """As in `Check`."""
    values: Values = field(default_factory=dict)
    """As in `Check`."""

    def passes(self) -> Check:
        """It is as wanted."""
        return Check(self.name, "pass", self.found, self.wanted, values=self.values)

    def warns(self, cure: str) -> Check:
        """It works, with a drawback."""
        return Check(self.name, "warn", self.found, self.wanted, cure, self.values)

    def fails(self, cure: str) -> Check:
        """It would not work."""
        return Check(self.name, "fail", self.found, self.wanted, cure, self.values)
