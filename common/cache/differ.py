"""Two caches side by side: identity field by field, values on samples that both hold."""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from common.cache import layout
from common.cache.reader import CacheReader
from common.record import TopK
from schemas.manifest import Manifest

DEFAULT_SAMPLES: Final = 32
"""Samples whose values are compared."""


@dataclass(slots=True)
class Gap:
    """How far two tables of rows are apart."""

    num_rows: int = 0
    """Rows at positions that both hold."""
    num_only_one: int = 0
    """Rows that one of them lacks."""
    largest_nats: float = 0.0
    """Largest |Δ log-prob| of an id that both keep."""
    shared: list[float] = field(default_factory=list)
    """Share of kept ids that both keep, row by row."""
    first: int = 0
    """Rows whose likeliest id is the same."""

    def add(self, a: TopK, b: TopK) -> None:
        """Count the rows of one record."""
        rows = {position: row for row, position in enumerate(b.positions.tolist())}
        common = [(i, rows[p]) for i, p in enumerate(a.positions.tolist()) if p in rows]
        self.num_only_one += len(a.positions) + len(b.positions) - 2 * len(common)
        for i, j in common:
            ours, theirs = _kept(a, i), _kept(b, j)
            both = ours.keys() & theirs.keys()
            self.num_rows += 1
            self.first += next(iter(ours), None) == next(iter(theirs), None)
            self.shared.append(len(both) / max(1, len(ours), len(theirs)))
            self.largest_nats = max([self.largest_nats, *(abs(ours[t] - theirs[t]) for t in both)])

    def to_json(self) -> dict[str, Any]:
        """Counts and shares."""
        rows = self.num_rows
        return {
            "rows": rows,
            "rows_of_one_only": self.num_only_one,
            "largest_logprob_gap_nats": self.largest_nats if rows else None,
            "topk_agreement": float(np.mean(self.shared)) if rows else None,
            "argmax_agreement": self.first / rows if rows else None,
        }


def _kept(rows: TopK, row: int) -> dict[int, float]:
    used = rows.logprobs[row] > -np.inf
    return dict(zip(rows.token_ids[row, used].tolist(), rows.logprobs[row, used].tolist(), strict=True))


def tolerance_nats(*manifests: Manifest) -> float:
    """How far equal log-probs may lie apart once both are encoded."""
    steps = [m.encoding.logit_step / 2 for m in manifests if m.encoding.logits == "steps"]
    return sum(steps) + 1e-3 * len(manifests)


def compare(first: CacheReader, second: CacheReader, *, num_samples: int = DEFAULT_SAMPLES) -> dict[str, Any]:
    """What differs, as JSON; `same` when nothing does beyond what the encodings allow.

    Args:
        first: One cache.
        second: Another.
        num_samples: How many of the samples that both hold, evenly spread.
    """
    lines = layout.differing_fields(
        layout.identity_fields(first.manifest), layout.identity_fields(second.manifest)
    )
    held = set(second.sample_ids)
    common = [name for name in first.sample_ids if name in held]
    chosen = np.unique(np.linspace(0, len(common) - 1, min(num_samples, len(common))).round().astype(int))
    response, visual, differing = Gap(), Gap(), 0
    with_text = not (first.manifest.without_text or second.manifest.without_text)
    for name in (common[i] for i in chosen.tolist()):
        a, b = first.read_record(name), second.read_record(name)
        if a.spans != b.spans or (with_text and not np.array_equal(a.token_ids, b.token_ids)):
            differing += 1
            continue
        response.add(a.response, b.response)
        for ours, theirs in zip(a.visual, b.visual, strict=True):
            if ours.topk is not None and theirs.topk is not None:
                visual.add(ours.topk, theirs.topk)
    allowed = tolerance_nats(first.manifest, second.manifest)
    close = max(response.largest_nats, visual.largest_nats) <= allowed and not differing
    missing = first.num_samples + second.num_samples - 2 * len(common)
    return {
        "same": not lines and close and not missing,
        "identity": lines,
        "samples": {
            "in_both": len(common),
            "only_in_first": first.num_samples - len(common),
            "only_in_second": second.num_samples - len(common),
            "compared": len(chosen),
            "other_token_ids": differing,
        },
        "response": response.to_json(),
        "visual": visual.to_json(),
        "encodings_allow_nats": allowed,
    }
