r"""One entry of a data file → one `Sample`: LLaVA conversations and chat messages.

    {"id", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ...]}
    {"id", "messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, ...]}, ...]}
                                        │
                Sample(images=(a.png,), turns=(Turn("user", (0, "What?")), ...))

Entries without a response, and images without any text, are read too: a teacher may answer them.

An entry with a video, sound or another input that no model here reads is refused: its text
alone would teach answers about something that was never shown.

An `<image>` mark inside text, and an image part that names no file, both take the next image of the
entry's own list. Line breaks next to a mark belong to the mark: chat templates write their own.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from common.errors import DataError, quote, shorten
from schemas.sample import ImageRef, Role, Sample, Turn

IMAGE_MARK = "<image>"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

OTHER_INPUTS = frozenset(
    f"{name}{ending}"
    for name in ("video", "audio", "sound", "speech", "point_cloud", "input_audio", "input_video")
    for ending in ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files", "_bytes")
)
"""Fields of an entry, and types of message parts, that name an input other than text and images."""

_OWN_FIELDS = frozenset(
    {"id", "image", "images", "conversations", "messages", "kind", "question_type", "unusable", "reason"}
)

_LONGEST_PATH_BYTES = 4095
_LONGEST_NAME_BYTES = 255

Entry = Mapping[str, Any]


def entry_id(entry: object, index: int) -> str:
    """The entry's id as text, or its index when it has none that is usable."""
    found = entry.get("id") if isinstance(entry, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, str | int):
        return str(index)
    return str(found).encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text


def first_reference(entry: object) -> ImageRef | None:
    """The entry's first image reference; None without images or when it is unusable."""
    try:
        return next(_references(entry), None) if isinstance(entry, Mapping) else None
    except Exception:  # noqa: BLE001 - `to_sample` reports what is wrong with it
        return None


def reference_key(ref: ImageRef) -> int:
    """64-bit signed hash of a reference, never 0: what `SampleSource.image_keys` holds."""
    raw = ref.data if ref.path is None else ref.path.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(raw or b"", digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def to_sample(entry: object, *, sample_id: str, where: str) -> Sample:
    """Read one entry of either layout.

    Args:
        entry: What the file holds: a mapping with `conversations` or `messages`.
        sample_id: Its id.
        where: File and place, for messages.

    Raises:
        DataError: `entry`: no such mapping; `turns`: unknown speakers or no turn; `image-marks`:
            marks and images do not match; `empty-response`; `image-remote`; `image-reference`; `text`:
            half a surrogate pair; `video`, `audio` and so on: an input that is neither text nor image;
            or the value of the entry's `unusable`, where an earlier step has set it.
    """
    try:
        return _read(entry, sample_id, where)
    except DataError:
        raise
    except Exception as error:  # whatever one entry holds, the others can be used
        raise DataError(
            f"{where}: reading it raised {type(error).__name__}: {shorten(str(error))}; fix or drop it",
            reason="entry",
        ) from error


def _read(entry: object, sample_id: str, where: str) -> Sample:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: found {_kind_of(entry)}, wanted an object", reason="entry")
    if "unusable" in entry:
        raise DataError(str(entry["unusable"]), reason=str(entry.get("reason", "entry")))
    _refuse_other_inputs(entry, where)
    own = tuple(_own_images(entry))
    if own and entry.get("conversations") is None and entry.get("messages") is None:
        return Sample(sample_id=sample_id, images=own, turns=())
    reading = _Reading(list(own), where)
    turns = tuple(reading.turn(number, turn) for number, turn in enumerate(_turns(entry, where)))
    reading.check_all_used()
    _check_responses(turns, where)
    kind = entry.get("kind") or entry.get("question_type")
    if kind is not None and not isinstance(kind, str):
        raise DataError(f"{where}: kind is {_kind_of(kind)}, wanted a string", reason="entry")
    return Sample(sample_id=sample_id, images=tuple(reading.images), turns=turns, kind=kind)


def _kind_of(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _refuse_other_inputs(entry: Entry, where: str) -> None:
    """A known field, or any whose name the text marks as it would an image: `<lidar>` beside `lidar`."""
    for name in map(str, entry.keys() - _OWN_FIELDS):
        if entry.get(name) in (None, "", [], {}):
            continue
        marks = f"<{name}>", f"<{name.removesuffix('s')}>"
        if name in OTHER_INPUTS or any(mark in text for text in _texts(entry) for mark in marks):
            raise _other_input(where, name)


def _texts(entry: Entry) -> Iterator[str]:
    turns = entry.get("conversations") or entry.get("messages")
    for turn in turns if isinstance(turns, list | tuple) else ():
        content = turn.get("value") or turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list | tuple) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def _other_input(where: str, name: str) -> DataError:
    known = (each for each in sorted(OTHER_INPUTS, key=len) if name.startswith(each))
    reason = next(known, name)
    return DataError(
        f"{where}: has {name!r}, which neither teacher nor student is shown; wanted text and images "
        "only, drop the entry",
        reason=reason.replace("_", "-"),
    )


def _turns(entry: Entry, where: str) -> Sequence[Any]:
    for name in ("conversations", "messages"):
        turns = entry.get(name)
        if turns is None:
            continue
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise DataError(f"{where}: {name} is {_kind_of(turns)}, wanted a list of turns", reason="entry")
        return turns
    raise DataError(
        f"{where}: found fields {quote(sorted(map(str, entry)), 200)}, wanted `conversations` or `messages`",
        reason="entry",
    )


def _check_responses(turns: tuple[Turn, ...], where: str) -> None:
    if not turns:
        raise DataError(f"{where}: found 0 turns; wanted a question, and a response to learn", reason="turns")
    responses = [turn for turn in turns if turn.role == "assistant"]
    for number, turn in enumerate(responses):
        if not "".join(str(part) for part in turn.parts).strip():
            raise DataError(
                f"{where}: response {number} is empty; wanted some text, fix or drop the entry",
                reason="empty-response",
            )


def _own_images(entry: Entry) -> Iterator[ImageRef]:
    for name in ("image", "images"):
        found = entry.get(name)
        if found is None or found == "":
            continue
        for value in found if isinstance(found, list | tuple) else [found]:
            yield to_reference(value)


def _references(entry: Entry) -> Iterator[ImageRef]:
    """All references, those inside message parts included, in the order in which marks take them."""
    own = list(_own_images(entry))
    if own:
        yield from own
        return
    for message in entry.get("messages") or ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            value = _part_image(part) if isinstance(part, Mapping) else None
            if value is not None:
                yield to_reference(value)


def to_reference(value: object) -> ImageRef:
    """An image reference from a path, a `file:` or `data:` address, or `{"bytes", "path"}`.

    Raises:
        DataError: `image-remote` for http and other addresses, `image-reference` for anything else.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return ImageRef(data=value["bytes"])
        value = value.get("path") or value.get("url") or value.get("image")
    if isinstance(value, bytes):
        return ImageRef(data=value)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"image reference is {_kind_of(value)}, wanted a file path or encoded bytes",
            reason="image-reference",
        )
    scheme, _, rest = value.partition(":")
    if scheme == "data":
        return ImageRef(data=_inline(rest))
    if scheme == "file" and rest.startswith("//"):
        return ImageRef(path=_checked_path(unquote(urlsplit(value).path)))
    if rest.startswith("//"):
        raise DataError(
            f"image {quote(value)} is remote; cascache reads local files only, download it and name the file",
            reason="image-remote",
        )
    return ImageRef(path=_checked_path(value))


def _checked_path(path: str) -> str:
    """The path, if a file system could hold it: inline data must not be taken for a file name."""
    encoded = path.encode("utf-8", "surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) > _LONGEST_PATH_BYTES or longest > _LONGEST_NAME_BYTES:
        raise DataError(
            f"image reference {quote(path)} has {len(encoded)} bytes, too long for a file name; encoded "
            "bytes are written data:image/png;base64,...",
            reason="image-reference",
        )
    if any(ord(each) < 32 or 0xD800 <= ord(each) < 0xE000 for each in path):
        raise DataError(
            f"image reference {quote(path)} has a control character or half a surrogate pair; wanted a "
            "file path",
            reason="image-reference",
        )
    return path


def _inline(rest: str) -> bytes:
    head, _, body = rest.partition(",")
    try:
        if head.endswith(";base64"):
            return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"inline image is not base64: {error}", reason="image-reference") from error
    raise DataError(f"inline image has encoding {quote(head)}, wanted base64", reason="image-reference")


def _part_image(part: Mapping[str, Any]) -> object:
    """What an image part names, or None when it takes the next of the entry's own images."""
    if part.get("type") not in ("image", "image_url"):
        return None
    values = (part.get(name) for name in ("image", "path", "url", "image_url", "bytes"))
    return next((value for value in values if value is not None), None)


class _Reading:
    """Collects images while turns are read in order."""

    def __init__(self, own: list[ImageRef], where: str) -> None:
        self.images: list[ImageRef] = []
        self.own = own
        self.used = 0
        self.where = where

    def turn(self, number: int, turn: object) -> Turn:
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{self.where}: turn {number} is {_kind_of(turn)}, wanted an object", reason="turns"
            )
        speaker = turn.get("from") or turn.get("role")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"{self.where}: turn {number} is from {quote(speaker)}, wanted one of {', '.join(ROLES)}",
                reason="turns",
            )
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        parts = tuple(self.parts(number, content))
        if role == "assistant" and any(isinstance(part, int) for part in parts):
            raise DataError(
                f"{self.where}: response turn {number} marks an image; wanted marks in questions only",
                reason="image-marks",
            )
        return Turn(role=role, parts=parts)

    def parts(self, number: int, content: object) -> Iterator[str | int]:
        if isinstance(content, str):
            yield from self.text(content)
        elif isinstance(content, list | tuple):
            for part in content:
                yield from self.part(number, part)
        else:
            raise DataError(
                f"{self.where}: turn {number} holds {_kind_of(content)}, wanted text or a list of parts",
                reason="turns",
            )

    def part(self, number: int, part: object) -> Iterator[str | int]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            yield from self.text(part["text"])
        elif isinstance(part, Mapping) and kind in ("image", "image_url"):
            value = _part_image(part)
            yield self.take(None if value is None else to_reference(value))
        elif isinstance(kind, str) and kind in OTHER_INPUTS:
            raise _other_input(f"{self.where}, turn {number}", kind)
        else:
            raise DataError(
                f"{self.where}: turn {number} has a part of type {quote(kind)}; "
                "wanted text, image or image_url",
                reason="turns",
            )

    def text(self, text: str) -> Iterator[str | int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: text holds half a surrogate pair ({quote(text[error.start])} at character "
                f"{error.start}); fix or drop the entry",
                reason="text",
            ) from error
        pieces = text.split(IMAGE_MARK)
        for place, piece in enumerate(pieces):
            if place:
                piece = piece.lstrip("\r\n")
                yield self.take(None)
            if place < len(pieces) - 1:
                piece = piece.rstrip("\r\n")
            if piece:
                yield piece

    def take(self, named: ImageRef | None) -> int:
        if named is not None:
            self.images.append(named)
        else:
            self.used += 1
            if self.used <= len(self.own):
                self.images.append(self.own[self.used - 1])
        return len(self.images) - 1

    def check_all_used(self) -> None:
        if self.used != len(self.own):
            raise DataError(
                f"{self.where}: found {self.used} {IMAGE_MARK} mark(s) for {len(self.own)} image(s); "
                f"wanted one mark for each image, fix the entry",
                reason="image-marks",
            )
