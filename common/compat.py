"""Can student S train from cache C? One function, every field compared, before any model loads.

field            must be equal, because
tokenizer        the cache holds token ids; special tokens and their ids are part of it
chat template    positions of prompt and response follow from it; the generation prompt matters
                 only where the teacher answered itself
image processor  pixels and the number and grid of image tokens follow from it
vocabulary       equal in its real rows
head             padding rows may differ and are left out

Fingerprints are taken from behaviour: the same tokenizer under another name fits.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from common.errors import MismatchError
from common.fingerprint import fingerprints
from common.template_fingerprint import former_chat_template_fingerprint
from common.vocab import Vocabulary, shared_rows
from schemas.manifest import Manifest

Verdict = Literal["fits", "fits with a note", "does not fit"]

_CURES: Final = {
    "tokenizer": "choose a student of the teacher's family, or dump with a teacher of the student's",
    "chat_template": "give the student the teacher's with --chat-template chat_template.jinja, or dump with "
    "the student's",
    "image_processor": "give the student the teacher's image settings, dump with the student's, or train on "
    "the student's own positions (--image-grid own)",
}
_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class FieldFit:
    """One field of the comparison."""

    name: str
    """Which one."""
    verdict: Verdict
    """Whether it fits."""
    cache: str
    """What the cache says, short enough for people."""
    student: str
    """What the student says."""
    note: str = ""
    """Why it does no harm, or what to do."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer: it fits when there are no problems; notes are worth writing down."""

    fields: tuple[FieldFit, ...]
    """Every field that was compared."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit, each with what to do."""
        return tuple(each.note for each in self.fields if each.verdict == "does not fit")

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs and does no harm."""
        return tuple(each.note for each in self.fields if each.verdict == "fits with a note")


def check_fit(manifest: Manifest, processor: Any, *, vocab_rows: int, own_grid: bool = False) -> Fit:
    """Compare a cache with a student, field by field.

    Args:
        manifest: The cache's identity.
        processor: The student's transformers processor.
        vocab_rows: Rows of the student's head, padding included; its real tokens are the tokenizer's.
        own_grid: Whether the student may see images through another processor.
    """
    found = fingerprints(processor, asked=manifest.capture.responses == "teacher")
    if manifest.fingerprints.chat_template == former_chat_template_fingerprint(processor):
        found = found.model_copy(update={"chat_template": manifest.fingerprints.chat_template})
    fields = [
        _compare(field, getattr(manifest.fingerprints, field), getattr(found, field), own_grid=own_grid)
        for field in _CURES
    ]
    return Fit((*fields, _compare_vocabulary(manifest, vocab_rows), _compare_heads(manifest, vocab_rows)))


def _compare(field: str, ours: str, theirs: str, *, own_grid: bool) -> FieldFit:
    name, cache, student = field.replace("_", " "), ours[:_SHOWN], theirs[:_SHOWN]
    if ours == theirs:
        return FieldFit(name, "fits", cache, student)
    note = f"{name} differs: cache {cache}, student {student}; {_CURES[field]}"
    harmless = own_grid and field == "image_processor"
    return FieldFit(name, "fits with a note" if harmless else "does not fit", cache, student, note)


def _compare_vocabulary(manifest: Manifest, vocab_rows: int) -> FieldFit:
    cache, student = f"{manifest.vocab_size} tokens", f"{min(vocab_rows, manifest.vocab_size)} tokens"
    teacher = Vocabulary(manifest.vocab_rows, manifest.vocab_size)
    try:
        shared_rows(teacher, Vocabulary(vocab_rows, manifest.vocab_size))
    except MismatchError as error:
        return FieldFit("vocabulary", "does not fit", cache, student, str(error))
    return FieldFit("vocabulary", "fits", cache, student)


def _compare_heads(manifest: Manifest, vocab_rows: int) -> FieldFit:
    cache, student = f"{manifest.vocab_rows} rows", f"{vocab_rows} rows"
    if vocab_rows == manifest.vocab_rows or vocab_rows < manifest.vocab_size:
        return FieldFit("head", "fits", cache, student)
    note = (
        f"heads are padded differently (teacher {manifest.vocab_rows} rows, student {vocab_rows}): "
        f"the {manifest.vocab_size} real rows are used on both sides"
    )
    return FieldFit("head", "fits with a note", cache, student, note)


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
