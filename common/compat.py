"""Can student S train from cache C? One function, every field compared, before any model loads.

field            must be equal, because
tokenizer        the cache holds token ids
chat template    positions of prompt and response follow from it
image processor  pixels and the number of image tokens follow from it
vocabulary       equal in its real rows; padding rows may differ and are left out
"""

from dataclasses import dataclass
from typing import Any

from common.errors import MismatchError
from common.fingerprint import fingerprints
from common.vocab import Vocabulary, shared_rows
from schemas.manifest import Manifest

_CURES = {
    "tokenizer": "choose a student of the teacher's family, or dump with a teacher of the student's",
    "chat_template": "give the student the teacher's chat_template.jinja, or dump with the student's",
    "image_processor": "give the student the teacher's image settings, dump with the student's, or train on "
    "the student's own positions (--image-grid own)",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer: it fits when there are no problems; notes are worth writing down."""

    problems: tuple[str, ...]
    """What does not fit, each with what to do."""
    notes: tuple[str, ...]
    """What differs and does no harm."""


def check_fit(manifest: Manifest, processor: Any, *, vocab_rows: int, own_grid: bool = False) -> Fit:
    """Compare a cache with a student, field by field.

    Args:
        manifest: The cache's identity.
        processor: The student's transformers processor.
        vocab_rows: Rows of the student's head, padding included; its real tokens are the tokenizer's.
        own_grid: Whether the student may see images through another processor.
    """
    found = fingerprints(processor)
    problems = [
        f"{field.replace('_', ' ')} differs: cache {ours[:12]}, student {theirs[:12]}; {_CURES[field]}"
        for field, ours, theirs in (
            (field, getattr(manifest.fingerprints, field), getattr(found, field)) for field in _CURES
        )
        if ours != theirs
    ]
    notes = []
    if own_grid:
        notes = [problem for problem in problems if problem.startswith("image processor")]
        problems = [problem for problem in problems if problem not in notes]
    teacher = Vocabulary(manifest.vocab_rows, manifest.vocab_size)
    try:
        shared_rows(teacher, Vocabulary(vocab_rows, manifest.vocab_size))
    except MismatchError as error:
        problems.append(str(error))
    if vocab_rows >= manifest.vocab_size and vocab_rows != manifest.vocab_rows:
        notes.append(
            f"heads are padded differently (teacher {manifest.vocab_rows} rows, student {vocab_rows}): "
            f"the {manifest.vocab_size} real rows are used on both sides"
        )
    return Fit(tuple(problems), tuple(notes))


def require_fit(
    cache: str, manifest: Manifest, student: str, processor: Any, *, vocab_rows: int, own_grid: bool = False
) -> tuple[str, ...]:
    """Return the notes of a fit, or refuse.

    Raises:
        MismatchError: Names every differing field and what to do about it.
    """
    fit = check_fit(manifest, processor, vocab_rows=vocab_rows, own_grid=own_grid)
    if fit.problems:
        listing = "\n  ".join(fit.problems)
        raise MismatchError(
            f"student {student} does not fit cache {cache} (teacher {manifest.teacher.model}):\n  {listing}"
        )
    return fit.notes
