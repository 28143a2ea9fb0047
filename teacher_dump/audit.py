"""`teacher-dump verify`: does a cache match its teacher? A few random samples, computed again.

    records ──drawn by seed──> images of the data ──transformers, the level's dtype──> logits, states
                                                            │
              kept log-probs, tails, factors  <──compared───┘

A cache of a float32 teacher differs by its encoding only; of a bfloat16 one also by rounding, which vLLM
and transformers do in another order. A teacher that did not see an image, another prompt or shifted rows
differ far more than either.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.cache.reader import CacheReader
from common.compat import require_images
from common.data.open import open_source, recorded_path
from common.data.source import SampleSource
from common.errors import ConfigError, MismatchError, PartMissing, quote
from common.fingerprint import weights_sha256
from common.images import decode_image, image_bytes
from common.models import resolve_model
from common.record import Record, TopK
from common.relation import relation
from schemas.manifest import Manifest
from teacher_dump.config import AuditConfig
from teacher_dump.placement import choose_device, free_bytes, needed_bytes
from teacher_dump.reference import Reference
from teacher_dump.teacher import find_teacher

Say = Callable[[str], None]

CHUNK_ROWS = 256
"""Rows whose logits exist at a time."""

_BFLOAT16_STEP = 2.0**-3
"""Step of bfloat16 log-probs in [16, 32)."""

_ROUNDING = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}
_OTHER_ARITHMETIC = 0.05
"""Quantised weights, or engine arguments that change what is computed: transformers does neither."""


class Tally:
    """Differences of one kind of rows."""

    def __init__(self, *, normalised: bool = False) -> None:
        """Start with none; `normalised` means that the cache holds log-probs in place of logits."""
        self._normalised = normalised
        self.rows = 0
        self.logit_error = 0.0
        self.lse_error = 0.0
        self.agreement: list[float] = []
        self.divergence: list[float] = []

    def add(self, kept: TopK, states: torch.Tensor, reference: Reference) -> None:
        """Compare rows with what the [T, D] states computed again give, a few rows at a time."""
        for start in range(0, len(kept.positions), CHUNK_ROWS):
            piece = _cut(kept, slice(start, start + CHUNK_ROWS))
            rows = torch.from_numpy(piece.positions.astype(np.int64)).to(states.device)
            self._add(piece, reference.logits(states[rows]))

    def _add(self, kept: TopK, logits: torch.Tensor) -> None:
        exact = logits.double().log_softmax(-1)
        logits = exact if self._normalised else logits
        used = torch.from_numpy(np.isfinite(kept.logprobs))
        ids = torch.from_numpy(np.array(kept.token_ids, np.int64))
        found = torch.from_numpy(kept.logprobs.astype(np.float64))
        theirs = exact.gather(-1, ids)
        normaliser = torch.from_numpy(kept.logsumexp[:, 0].astype(np.float64))
        raw = (found + normaliser[:, None] - logits.double().gather(-1, ids)).abs()
        exactly = used if kept.counts is None else used & torch.from_numpy(kept.counts == 0)
        self.rows += len(ids)
        self.logit_error = max(self.logit_error, float(raw[used].max()))
        self.lse_error = max(self.lse_error, float((normaliser - logits.double().logsumexp(-1)).abs().max()))
        best = exact.topk(ids.shape[1], dim=-1).indices
        best = best.masked_fill(~exactly, -1)  # as many as the row kept
        shared = ((ids[:, :, None] == best[:, None, :]) & exactly[:, :, None]).any(-1).sum(-1)
        self.agreement += (shared / exactly.sum(-1))[exactly.any(-1)].tolist()
        tail = torch.from_numpy(kept.log_tail[:, 0].astype(np.float64))
        self.divergence += _divergence(theirs, found, exactly, tail).tolist()

    def summary(self) -> dict[str, float]:
        """Worst and mean differences."""
        return {
            "rows": self.rows,
            "max_logit_error": self.logit_error,
            "max_logsumexp_error": self.lse_error,
            "topk_agreement": float(np.mean(self.agreement or [1.0])),
            "kl_mean_nats": float(np.mean(self.divergence)),
            "kl_max_nats": float(np.max(self.divergence)),
        }


def _cut(kept: TopK, rows: slice) -> TopK:
    """Some rows."""
    counts = None if kept.counts is None else kept.counts[rows]
    return TopK(
        kept.positions[rows],
        kept.token_ids[rows],
        kept.logprobs[rows],
        kept.log_tail[rows],
        kept.logsumexp[rows],
        counts,
    )


def _divergence(
    theirs: torch.Tensor, found: torch.Tensor, used: torch.Tensor, tail: torch.Tensor
) -> torch.Tensor:
    """[N] KL(computed again ‖ cache) in nats, what the cache did not keep taken as one bucket.

    Rounded log-probabilities do not add up to 1, so that it is Σ p log(p / q) − p + q: never negative.
    """
    kept = theirs.exp() * used
    terms = torch.where(used, kept * (theirs - found), torch.zeros_like(kept)).sum(-1)
    rest = (1 - kept.sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    bucket = torch.where(rest > 1e-12, rest * (rest.log() - tail), torch.zeros_like(rest))
    mass = torch.where(used, found.exp(), torch.zeros_like(found)).sum(-1) + tail.exp()
    return terms + bucket + mass - 1


class ImageTally:
    """Differences of what is kept of images besides their rows."""

    def __init__(self, gram: torch.Tensor | None, *, cosine: bool) -> None:
        """Start with none.

        Args:
            gram: [D, D] of the head, where relations are of logits.
            cosine: Whether rows are scaled to unit length first.
        """
        self._gram, self._cosine = gram, cosine
        self.factor_error = self.state_error = 0.0

    def add(self, record: Record, states: torch.Tensor) -> None:
        """Compare a record's images with the [T, D] hidden states computed again."""
        for image in record.visual:
            span = slice(image.start, image.start + image.num_positions)
            if image.hidden is not None:
                error = float((torch.from_numpy(image.hidden) - states[span]).abs().max())
                self.state_error = max(self.state_error, error)
            if image.factor is not None:
                exact = relation(states[span], self._gram, cosine=self._cosine).double()
                kept = torch.from_numpy(image.factor).double()
                kept = kept @ kept.T
                error = float((kept / kept.norm() - exact / exact.norm()).norm())
                self.factor_error = max(self.factor_error, error)


def audit(config: AuditConfig, say: Say) -> dict[str, Any]:
    """Compute samples again and compare.

    Args:
        config: The settings.
        say: Takes one line for the user.

    Returns:
        Differences by kind of rows, and whether they pass, as JSON types.

    Raises:
        CascacheError: The cache, its data or its teacher cannot be found, or are not those of the dump.
    """
    with CacheReader(config.cache) as cache:
        manifest = cache.manifest
        if not cache.num_samples:
            raise PartMissing(f"{config.cache} has no sealed sample yet; continue the dump first")
        source = _open_data(config, manifest)
        dtype = manifest.teacher.dtype if config.dtype == "auto" else config.dtype
        limit = config.max_kl or allowed_kl(manifest, dtype)
        reference, gram, where = _open_teacher(config, manifest, dtype, longest=int(cache.num_tokens.max()))
        draw = np.random.Generator(np.random.Philox(key=config.seed)).permutation(cache.num_samples)
        chosen = np.sort(draw[: config.sample])
        say(f"computing {len(chosen)} of {cache.num_samples} samples of {config.cache} again {where}")
        normalised = "capture" in manifest.teacher.engine
        tallies = {kind: Tally(normalised=normalised) for kind in ("response", "visual")}
        images = ImageTally(gram, cosine=manifest.relation.norm == "cosine")
        rows = {name: row for row, name in enumerate(source.sample_ids())}
        for index in tqdm(chosen, desc="verify", unit="sample"):
            record = cache.read_record(int(index))
            found_states = reference.states(record.token_ids, _images(record, source, rows))
            tallies["response"].add(record.response, found_states, reference)
            for image in record.visual:
                if image.topk is not None:
                    tallies["visual"].add(image.topk, found_states, reference)
            images.add(record, found_states.float().cpu())
    found = {name: tally.summary() for name, tally in tallies.items() if tally.rows}
    worst = max(each["kl_mean_nats"] for each in found.values()) if found else 0.0
    return {
        "cache": config.cache,
        "samples": len(chosen),
        **found,
        "max_factor_error": images.factor_error,
        "max_hidden_error": images.state_error,
        "dtype": dtype,
        "max_kl": limit,
        "ok": worst <= limit,
    }


def _open_data(config: AuditConfig, manifest: Manifest) -> SampleSource:
    found = manifest.data_source
    data = config.data or recorded_path(found.path if found else None)
    if data is None:
        where = f"was dumped from {quote(found.path)}" if found else "does not record where its data is"
        raise ConfigError(f"{config.cache} {where}, which is no file here; name it with --data")
    return open_source(data, image_root=config.image_root or (found.image_root if found else None))


def allowed_kl(manifest: Manifest, dtype: str) -> float:
    """Largest mean divergence, in nats, of a cache that matches: its encoding's and its arithmetic's.

    Args:
        manifest: The level's.
        dtype: What it is computed in again.
    """
    encoding = manifest.encoding
    step = {"steps": encoding.logit_step, "bfloat16": _BFLOAT16_STEP, "float32": 0.0}[encoding.logits]
    rounding = max(_ROUNDING[dtype], _ROUNDING[manifest.teacher.dtype])
    other = set(manifest.teacher.engine) - {"batch_invariant", "capture"}  # neither computes otherwise
    if manifest.teacher.quantization or other:
        rounding = max(rounding, _OTHER_ARITHMETIC)
    return rounding + step**2 / 8  # KL of log-probs that are off by half a step at most


def _open_teacher(
    config: AuditConfig, manifest: Manifest, dtype: str, *, longest: int
) -> tuple[Reference, torch.Tensor | None, str]:
    """The teacher, its head's gram where relations are of logits, and a description of how it computes."""
    ref = resolve_model(config.model or manifest.teacher.model)
    teacher = find_teacher(ref, dtype=dtype, with_weights=True, options=config, level=manifest)
    needed = needed_bytes(
        teacher.path,
        dtype=dtype,
        rows=CHUNK_ROWS,
        vocab_size=manifest.vocab_size,
        states=longest * manifest.hidden_size,
    )
    device = choose_device(needed, free_bytes(), config.device)
    found, wanted = weights_sha256(teacher.path), manifest.teacher.weights_sha256
    if found != wanted:
        raise MismatchError(
            f"{teacher.path} has weights {found[:12]}, {config.cache} was dumped from {wanted[:12]}; "
            "name that teacher with --model"
        )
    require_images(config.cache, manifest, teacher.processor)
    head = manifest.teacher.head_dtype or manifest.teacher.dtype
    reference = Reference(
        teacher.path,
        teacher.processor,
        vocab_size=manifest.vocab_size,
        dtype=dtype,
        head_dtype=head,
        device=device,
    )
    place = "all GPUs" if device == "auto" else device
    how = f"in {dtype}, the head in {head}, on {place} (about {needed / 1e9:.1f} GB)"
    return reference, reference.gram() if manifest.relation.of == "logits" else None, how


def _images(record: Record, source: SampleSource, rows: dict[str, int]) -> list[Any]:
    """The sample's images, decoded and checked against the hashes in the cache."""
    if record.sample_id not in rows:
        raise MismatchError(
            f"{source.path} has no sample {record.sample_id!r}; point --data at the samples that were dumped"
        )
    images = []
    refs = source[rows[record.sample_id]].images
    for number, ref in enumerate(refs):
        encoded = image_bytes(ref, source.image_root)
        where = f"image {number} of {record.sample_id}"
        if number < len(record.visual):
            found, wanted = hashlib.sha256(encoded).hexdigest(), record.visual[number].image_sha256
            if found != wanted:
                raise MismatchError(
                    f"{where} has sha256 {found[:12]}, the cache says {wanted[:12]}; restore the image"
                )
        images.append(decode_image(encoded, where=where))
    shown = sum(span.kind == "image" for span in record.spans)
    return images[:shown]
