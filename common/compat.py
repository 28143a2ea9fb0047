"""Can student S train from cache C? One function, every field compared, before any model loads.

field            must be equal, because
tokenizer        the cache holds token ids; special tokens and their ids are part of it
chat template    positions of prompt and response follow from it; the generation prompt matters
                 only where the teacher answered itself
image processor  pixels and the number and grid of image tokens follow from it
vocabulary       equal in its real rows
head             padding rows may differ and are left out

Fingerprints are taken from behaviour: the same tokenizer under another name fits. Caches from before
`image_settings` fit where the settings that their fingerprint covers are the same, with a note.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from common.cache.terminal import plain
from common.errors import MismatchError
from common.fingerprint import fingerprints, first_image_fingerprint, image_processor_fingerprint
from common.image_settings import image_settings
from common.pixels import bounds_in
from common.template_fingerprint import former_chat_template_fingerprint
from common.vocab import Vocabulary, shared_rows
from schemas.manifest import Manifest

Verdict = Literal["fits", "fits with a note", "does not fit"]

_CURES: Final = {
    "tokenizer": "choose a student of the teacher's family, or dump with a teacher of the student's",
    "chat_template": "give the student the file that the dump was given (--chat-template), or without "
    "one the teacher's own chat_template.jinja; or dump with the student's",
    "image_processor": "give the student the teacher's image settings, dump with the student's, or train on "
    "the student's own positions (--image-grid own)",
}
_SHOWN: Final = 12
_SHOWN_SETTINGS: Final = 4
_SHOWN_CHARACTERS: Final = 40
_BOUNDS: Final = frozenset({"image_processor.size.shortest_edge", "image_processor.size.longest_edge"})
_FIRST_DAYS: Final = (
    "the cache names no image settings: its fingerprint covers size, crop, mean and patches, not the number "
    "of tiles nor what resizes; the positions of each image are compared as it is read"
)


@dataclass(frozen=True, slots=True)
class FieldFit:
    """One field of the comparison."""

    name: str
    """Which one."""
    verdict: Verdict
    """Whether it fits."""
    cache: str
    """The cache's value, shortened for display."""
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
        _compare(field, getattr(manifest.fingerprints, field), getattr(found, field))
        for field in ("tokenizer", "chat_template")
    ]
    fields.append(_compare_images(manifest, found.image_processor, processor, own_grid=own_grid))
    return Fit((*fields, _compare_vocabulary(manifest, vocab_rows), _compare_heads(manifest, vocab_rows)))


def _compare(field: str, ours: str, theirs: str) -> FieldFit:
    name, cache, student = field.replace("_", " "), ours[:_SHOWN], theirs[:_SHOWN]
    if ours == theirs:
        return FieldFit(name, "fits", cache, student)
    note = f"{name} differs: cache {cache}, student {student}; {_CURES[field]}"
    return FieldFit(name, "does not fit", cache, student, note)


def _compare_images(manifest: Manifest, theirs: str, processor: Any, *, own_grid: bool) -> FieldFit:
    fit = _compare("image_processor", manifest.fingerprints.image_processor, theirs)
    if fit.verdict == "fits":
        return fit
    ours = manifest.fingerprints.image_processor
    if not manifest.image_settings and ours == first_image_fingerprint(processor):
        return replace(fit, verdict="fits with a note", note=_FIRST_DAYS)
    why = _differences(manifest.image_settings, image_settings(processor)) if manifest.image_settings else ""
    note = f"image processor differs: {why}" if why else fit.note
    return replace(fit, verdict="fits with a note" if own_grid else "does not fit", note=note)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first settings that differ, and what to do about them; empty where none does."""
    leaves = list(_leaves(ours, theirs))
    lines = [
        f"{_short(name.removeprefix('image_processor.'))} is {_short(found)} in the cache, "
        f"{_short(wanted)} here"
        for name, found, wanted in leaves
    ]
    names = {name for name, _, _ in leaves}
    shown = "; ".join(lines[:_SHOWN_SETTINGS]) + (" and more" if len(lines) > _SHOWN_SETTINGS else "")
    bounds = bounds_in(ours)
    if bounds and bounds_in(theirs) and names <= _BOUNDS:
        cure = f"give --max-pixels {bounds.most} --min-pixels {bounds.least}, or leave both out"
    elif names == {"back_end"}:
        cure = "the two resize differently; install torchvision where it is missing"
    else:
        cure = _CURES["image_processor"]
    return f"{shown}; {cure}" if shown else ""


def _leaves(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of every setting that differs."""
    for name in sorted(ours.keys() | theirs.keys()):
        found, wanted = ours.get(name), theirs.get(name)
        if isinstance(found, Mapping) and isinstance(wanted, Mapping):
            yield from _leaves(found, wanted, f"{prefix}{name}.")
        elif found != wanted:
            yield f"{prefix}{name}", found, wanted


def _short(value: Any) -> str:
    """A value in few characters; a cache's values are untrusted."""
    text = "absent" if value is None else plain(str(value)[:_SHOWN_CHARACTERS])
    return text if len(text) < _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 4]} ..."


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


def require_images(cache: str, manifest: Manifest, processor: Any) -> None:
    """Refuse a processor that would show a model other images than the cache's teacher saw.

    Raises:
        MismatchError: Names the settings that differ and what to do about them.
    """
    theirs = image_processor_fingerprint(processor)
    fit = _compare_images(manifest, theirs, processor, own_grid=False)
    if fit.verdict == "does not fit":
        raise MismatchError(f"images of {cache} (teacher {manifest.teacher.model}): {fit.note}")


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
