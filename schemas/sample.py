"""One training example as the data holds it, and the spans of its token sequence.

Sample  sample_id  kind  images  turns
│       └─ Turn(role, parts): text and image marks in reading order
└─ ImageRef: a path, or the encoded bytes themselves

position   0        1 ....... 36   37 ........ 44   45 .... 47
span       prompt   image (0)      prompt           response
"""

from typing import Literal

from schemas.base import Frozen

Role = Literal["system", "user", "assistant"]
SpanKind = Literal["image", "prompt", "response"]


class ImageRef(Frozen):
    """Where one image is: a path on disk, or its encoded bytes (exactly one of the two)."""

    path: str | None = None
    """Path of the encoded image file as the data names it; relative paths start from the image root."""
    data: bytes | None = None
    """The encoded image (PNG, JPEG, ...), when the data set carries it inline."""


class Turn(Frozen):
    """What one speaker says: text, with images where they stand."""

    role: Role
    """Who speaks."""
    parts: tuple[str | int, ...]
    """Text, and image marks as indices into `Sample.images`, in reading order."""


class Sample(Frozen):
    """One example with a stable id. Text-only samples have no images."""

    sample_id: str
    """Unique in its data set; what caches and errors name the sample by."""
    images: tuple[ImageRef, ...] = ()
    """The images, in the order in which the turns mark them."""
    turns: tuple[Turn, ...]
    """The conversation. Assistant turns are the responses that a teacher scores."""
    kind: str | None = None
    """Free label: the question type, or `caption`; stages and metrics can select by it."""


class Span(Frozen):
    """A half-open range `[start, stop)` of positions in the expanded token sequence."""

    kind: SpanKind
    """What the tokens are."""
    start: int
    """First position."""
    stop: int
    """One past the last position."""


class Tile(Frozen):
    """A grid of patches inside an image span.

    Patch (row, column) stands at `span.start + offset + row * stride + column`. Positions that
    no tile covers (newline tokens, separators) are not patches.
    """

    offset: int
    """Position of the first patch, counted from the start of the image span."""
    rows: int
    """Patch rows."""
    columns: int
    """Patch columns."""
    stride: int
    """Positions from one patch row to the next; larger than `columns` when rows end in a newline token."""
