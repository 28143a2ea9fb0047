"""Samples that cannot be used, found without decoding or tokenising anything: what a dry run counts.

    100,000 evenly spaced samples      marks, empty answers, image files that are not there
    2,000 of them                      and what the chat template does to their text

Fewer than a dump will find: a torn image, an overlong sample or a refused size show only there.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.source import SampleSource
from common.errors import DataError
from common.images import image_path
from common.render import render, render_segments
from schemas.sample import Sample, Turn

_MOST_CHECKED = 100_000
_MOST_RENDERED = 2_000


@dataclass(slots=True)
class Faults:
    """Unusable samples by reason."""

    checked: int
    """Samples looked at."""
    rendered: int
    """Those of them that were rendered under the chat template too, unless something else is wrong."""
    counts: Counter[str] = field(default_factory=Counter)
    """Unusable ones, by `Quarantined.reason`."""
    first: str = ""
    """The first one's message."""

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "checked": self.checked,
            "rendered": self.rendered,
            "by_reason": dict(sorted(self.counts.items())),
            "first": self.first,
        }


def find_faults(source: SampleSource, indices: NDArray[np.int64], processor: Any, *, asks: bool) -> Faults:
    """Look at every sample, or at 100,000 evenly spaced ones; render 2,000 of them, evenly spaced too.

    Args:
        source: The samples.
        indices: Those to look at.
        processor: The teacher's, with the chat template of the dump.
        asks: Whether the teacher answers itself, so that samples need no answers.
    """
    chosen = indices[_spaced(len(indices), _MOST_CHECKED)]
    rendered = set(chosen[_spaced(len(chosen), _MOST_RENDERED)].tolist())
    faults = Faults(len(chosen), len(rendered))
    known: dict[str, bool] = {}
    for index in chosen.tolist():
        try:
            sample = source[index]
            _check(sample, source.image_root, asks, known)
            if index in rendered:
                (render_segments if asks else render)(processor, sample)
        except DataError as error:
            faults.counts[error.reason] += 1
            faults.first = faults.first or str(error)
    return faults


def _spaced(num: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, num - 1, min(num, most)).astype(np.int64))


def _check(sample: Sample, root: str | None, asks: bool, known: dict[str, bool]) -> None:
    marks = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    if marks != list(range(len(sample.images))):
        raise DataError(
            f"{sample.sample_id}: turns mark images {marks}, it has {len(sample.images)}; "
            "mark each once, in order",
            reason="image-marks",
        )
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    if not asks and not (answers and all(map(_says_something, answers))):
        raise DataError(f"{sample.sample_id}: an assistant turn is empty or missing", reason="empty-response")
    for ref in sample.images:
        path = image_path(ref, root)
        if path is None:
            continue
        if str(path) not in known:
            known[str(path)] = path.exists()
        if not known[str(path)]:
            raise DataError(
                f"{sample.sample_id}: image {path} does not exist; fix the data or point "
                "--image-root at the images",
                reason="image-missing",
            )


def _says_something(turn: Turn) -> bool:
    return any(isinstance(part, str) and part.strip() for part in turn.parts)
