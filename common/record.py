"""What a cache holds for one sample, in memory: plain numpy, no behaviour.

Axes: N rows, K kept tokens, H temperatures, T sequence length, P image positions, D width, R rank.

    Record   token_ids [T], spans
      ├─ response: TopK              rows that predict the response tokens (row p predicts p + 1)
      └─ visual: VisualRecord, ...   one per image; shared by all samples of that image and prefix
            ├─ topk: TopK            rows at the image positions themselves (not shifted)
            ├─ hidden [P, D]         final hidden states, after the last norm
            └─ factor [P, R]         A with relation R ≈ A Aᵀ
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.sample import Span, Tile


@dataclass(frozen=True, slots=True)
class TopK:
    """Sparse next-token distributions.

    Kept ids come in order of falling log-probability. An unused slot (adaptive k) has log-prob
    −inf and id 0; a slot with log-prob −inf never counts as kept.
    """

    positions: NDArray[np.int32]
    """[N] position of each row in the expanded sequence."""
    token_ids: NDArray[np.int32]
    """[N, K] kept token ids."""
    logprobs: NDArray[np.float32]
    """[N, K] log-softmax over the full vocabulary at temperature 1, in nats."""
    log_tail: NDArray[np.float32]
    """[N, H] log of the mass outside the kept ids at each temperature; −inf when nothing is outside."""
    logsumexp: NDArray[np.float32]
    """[N, H] logsumexp of logits / temperature: raw logits are `logprobs + logsumexp[:, :1]`."""
    counts: NDArray[np.int32] | None = None
    """[N, K] draws of each id in the random sampling modes, in proportion to its probability among all ids
    that are not kept exactly; 0 for exactly kept ids."""


@dataclass(frozen=True, slots=True)
class VisualRecord:
    """Knowledge about one image in one prefix."""

    key: str
    """32 hex digits over the prefix's token ids and image hashes: equal key, equal knowledge."""
    image_sha256: str
    """Hash of the encoded image file's bytes."""
    start: int
    """First position of the image span."""
    num_positions: int
    """P, the length of the image span."""
    tiles: tuple[Tile, ...]
    """Which of the positions are patches, and how they lie."""
    topk: TopK | None
    """Rows kept at image positions; fewer than P under `visual_fraction`."""
    hidden: NDArray[np.float32] | None
    """[P, D] final hidden states."""
    factor: NDArray[np.float32] | None
    """[P, R] relation factor."""
    factor_error: float = 0.0
    """Achieved distance ‖R̂ − R̂_A‖ of the unit relation from that of its factor. The relative error of an
    RDist gradient is at most this over sin θ, cos θ = 1 − RDist."""
    encoded: bytes | None = None
    """The encoded image file, on the way into a cache that keeps images; readers give it by `read_images`."""


@dataclass(frozen=True, slots=True)
class Record:
    """What the cache holds for one sample."""

    sample_id: str
    """The sample it belongs to."""
    kind: str | None
    """`Sample.kind`, carried over for selection."""
    token_ids: NDArray[np.int32]
    """[T] the expanded sequence as the teacher saw it."""
    spans: tuple[Span, ...]
    """Image, prompt and response spans, covering the sequence in order."""
    response: TopK
    """Rows of all response spans."""
    visual: tuple[VisualRecord, ...]
    """One per image span, in order."""
