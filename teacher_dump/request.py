"""What the driver asks of the capture, and what comes back: plain bytes, safe to send to any worker.

    driver                                                         vLLM worker
    CaptureRequest ──to_extra──> SamplingParams.extra_args ──from_extra──> rows to keep, what to check
    Captured <──from_wire── collective_rpc("cascache_drain") <──to_wire── (dtype, shape, bytes)

The engine may live in another process, whose channel carries msgpack: only numbers, text and bytes.

Axes: N rows, K kept tokens, H temperatures, P image positions, D width, r rank.
"""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.streams import key_of, stream

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA_ARG = "cascache"
ROWS_MISSING = "rows-missing"
"""The `reason` of a result some of whose wanted positions were never computed."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """What every request has in common."""

    topk: int
    """Exact ids at response rows; 0 where all are drawn at random."""
    visual_topk: int
    """Exact ids at image rows; 0 where all are drawn at random."""
    vocab_size: int
    """Real tokens: rows of the head at and above it are padding and take no part in anything."""
    temperatures: tuple[float, ...] = (1.0,)
    """H temperatures, the first of them 1."""
    topk_mass: float | None = None
    """Share after which no further id is kept."""
    draws: int = 0
    """Ids drawn at random from the rest."""
    seed: int = 0
    """Of the draws; each response and each image has a stream of its own."""
    store: Literal["factor", "hidden", "both", "none"] = "factor"
    """What is kept of an image besides its rows."""
    of: Literal["logits", "hidden"] = "logits"
    """What the relation relates."""
    cosine: bool = False
    """Whether rows are scaled to unit length first."""
    tolerance: float = 1e-3
    """Factor error that the rank is chosen for."""
    max_rank: int = 128
    """Largest rank kept."""
    chunk_rows: int = 256
    """Rows whose logits exist at a time."""


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """What the worker must find at an image span."""

    identifier: str
    """Hash of the decoded pixels; vLLM carries it as the image's uuid."""
    start: int
    """First position."""
    stop: int
    """One past the last position."""


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What one sample asks of the capture."""

    key: str
    """Names the result."""
    num_positions: int
    """T, length of the expanded sequence."""
    token_sha256: str
    """`hash_tokens` of the expanded sequence."""
    images: tuple[ImageIdentity, ...]
    """Every image, in order."""
    response_rows: NDArray[np.int32]
    """[N] rows whose top-k is wanted at K = topk."""
    visual_rows: tuple[NDArray[np.int32] | None, ...]
    """Per image: rows wanted at K = visual_topk; None where the image's knowledge is not wanted again."""

    def to_extra(self) -> dict[str, Any]:
        """The request as numbers, text and bytes."""
        return {
            "key": self.key,
            "num_positions": self.num_positions,
            "token_sha256": self.token_sha256,
            "images": [[each.identifier, each.start, each.stop] for each in self.images],
            "response_rows": self.response_rows.astype("<i4").tobytes(),
            "visual_rows": [
                None if rows is None else rows.astype("<i4").tobytes() for rows in self.visual_rows
            ],
        }

    @classmethod
    def from_extra(cls, extra: dict[str, Any]) -> "CaptureRequest":
        """The inverse of `to_extra`."""
        return cls(
            extra["key"],
            extra["num_positions"],
            extra["token_sha256"],
            tuple(ImageIdentity(*each) for each in extra["images"]),
            np.frombuffer(extra["response_rows"], "<i4"),
            tuple(None if rows is None else np.frombuffer(rows, "<i4") for rows in extra["visual_rows"]),
        )


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """Top-k of N rows; see `common.record.TopK`."""

    token_ids: NDArray[np.int32]
    """[N, K]."""
    logprobs: NDArray[np.float32]
    """[N, K]."""
    log_tail: NDArray[np.float32]
    """[N, H]."""
    logsumexp: NDArray[np.float32]
    """[N, H]."""
    counts: NDArray[np.int32] | None = None
    """[N, K], where ids were drawn at random."""


@dataclass(frozen=True, slots=True)
class CapturedImage:
    """One image's knowledge."""

    rows: CapturedRows | None
    """Rows at the wanted image positions, if any were."""
    hidden: NDArray[np.float32] | None
    """[P, D] final hidden states."""
    factor: NDArray[np.float32] | None
    """[P, r] relation factor."""
    factor_error: float
    """See `common.relation`."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One sample's result: everything wanted, or why not."""

    key: str
    """Of the request."""
    problem: str | None = None
    """What the worker refused, in words."""
    reason: str = "engine"
    """One word for the problem."""
    response: CapturedRows | None = None
    """Rows of the responses."""
    images: dict[int, CapturedImage] = field(default_factory=dict)
    """Wanted images by index."""

    def to_wire(self) -> dict[str, Any]:
        """The result as numbers, text and bytes."""
        arrays: dict[str, Array] = {}
        errors: dict[str, float] = {}
        if self.response is not None:
            _put_rows(arrays, "response", self.response)
        for index, image in self.images.items():
            errors[str(index)] = image.factor_error
            if image.rows is not None:
                _put_rows(arrays, str(index), image.rows)
            for name in ("hidden", "factor"):
                if getattr(image, name) is not None:
                    arrays[f"{index}/{name}"] = getattr(image, name)
        packed = {
            name: [value.dtype.str, list(value.shape), value.tobytes()] for name, value in arrays.items()
        }
        return {
            "key": self.key,
            "problem": self.problem,
            "reason": self.reason,
            "errors": errors,
            "arrays": packed,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> "Captured":
        """The inverse of `to_wire`."""
        arrays = {
            name: np.frombuffer(data, dtype).reshape(shape)
            for name, (dtype, shape, data) in wire["arrays"].items()
        }
        images = {
            int(index): CapturedImage(
                _take_rows(arrays, index), arrays.get(f"{index}/hidden"), arrays.get(f"{index}/factor"), error
            )
            for index, error in wire["errors"].items()
        }
        return cls(wire["key"], wire["problem"], wire["reason"], _take_rows(arrays, "response"), images)


def uniforms(seed: int, name: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on the seed, the name and their place alone."""
    return stream(seed, key_of(name)).random(shape)


def hash_tokens(token_ids: NDArray[np.int32]) -> str:
    """Hex digest of a token sequence."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def pixel_identity(pixels: "Image") -> str:
    """Hex digest of an image's decoded pixels, mode and size."""
    digest = hashlib.sha256(f"{pixels.mode} {pixels.size}".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


_ROW_FIELDS = ("token_ids", "logprobs", "log_tail", "logsumexp", "counts")


def _put_rows(arrays: dict[str, Array], prefix: str, rows: CapturedRows) -> None:
    found = {f"{prefix}/{name}": getattr(rows, name) for name in _ROW_FIELDS}
    arrays.update({name: values for name, values in found.items() if values is not None})


def _take_rows(arrays: dict[str, Array], prefix: str) -> CapturedRows | None:
    if f"{prefix}/token_ids" not in arrays:
        return None
    return CapturedRows(*(arrays[f"{prefix}/{name}"] for name in _ROW_FIELDS if f"{prefix}/{name}" in arrays))
