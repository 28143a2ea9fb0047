"""The data of `bench_cache`: simulated rows and states as records, and an index of 665k samples."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.cache.index import Index, Names, write_index
from common.cache.reader import CacheReader
from common.cache.store import LocalStore
from common.cache.writer import CacheWriter
from common.record import Record, TopK, VisualRecord
from common.relation import factor_relation, rdist, relation
from schemas.manifest import (
    Capture,
    Fingerprints,
    Manifest,
    Relation,
    SampleSet,
    TeacherIdentity,
)
from schemas.sample import Span, Tile
from scripts.simulated_vlm import VOCAB, Simulated, smooth_field

PROMPT = 5

RELATION_TOLERANCE = 4.5e-3
"""‖R̂ − R̂_A‖ that ranks are chosen for: the error of the gradient in the student's states is a fifth of it."""


def exact_rows(data: Simulated) -> tuple[TopK, NDArray[np.int64]]:
    """All rows, and the first row of each sample."""
    logprobs = data.logits - data.logsumexp[:, None]
    kept = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    tail = np.log(np.maximum(1 - kept, 1e-9)).astype(np.float32)[:, None]
    offsets = np.concatenate([[0], np.cumsum(data.num_visual + data.num_response)]).astype(np.int64)
    positions = np.arange(len(logprobs), dtype=np.int32)
    return TopK(positions, data.token_ids, logprobs, tail, data.logsumexp[:, None]), offsets


def cut(rows: TopK, start: int, stop: int, first: int) -> TopK:
    """Some rows, standing at `first` and on."""
    positions = np.arange(first, first + stop - start, dtype=np.int32)
    return TopK(
        positions,
        rows.token_ids[start:stop],
        rows.logprobs[start:stop],
        rows.log_tail[start:stop],
        rows.logsumexp[start:stop],
    )


def records_of(data: Simulated, *, questions: int = 1) -> list[Record]:
    """Samples of one image, a prompt and a response each; `questions` of them share an image."""
    rows, offsets = exact_rows(data)
    records, image = [], None
    for index, (visual, response) in enumerate(
        zip(data.num_visual.tolist(), data.num_response.tolist(), strict=True)
    ):
        start = int(offsets[index])
        if index % questions == 0 or image is None:
            side = int(visual**0.5)
            tiles = (Tile(offset=0, rows=side, columns=side, stride=side),)
            topk = cut(rows, start, start + visual, PROMPT)
            name = f"{index:032x}"
            image = VisualRecord(name, name * 2, PROMPT, visual, tiles, topk, None, None)
        stop = PROMPT + image.num_positions
        spans = (
            Span(kind="prompt", start=0, stop=PROMPT),
            Span(kind="image", start=PROMPT, stop=stop),
            Span(kind="response", start=stop, stop=stop + response),
        )
        tokens = np.concatenate(
            [np.full(stop, 151_655), rows.token_ids[start + visual : start + visual + response, 0]]
        )
        answer = cut(rows, start + visual, start + visual + response, stop - 1)
        records.append(Record(f"sample-{index}", "caption", tokens.astype(np.int32), spans, answer, (image,)))
    return records


def level_of(records: list[Record], *, part_samples: int | None = None) -> Manifest:
    """A manifest for simulated records."""
    return Manifest(
        teacher=TeacherIdentity(
            model="simulated", weights_sha256="0" * 64, model_type="none", dtype="float32"
        ),
        fingerprints=Fingerprints(tokenizer="0", chat_template="0", image_processor="0"),
        vocab_rows=VOCAB,
        vocab_size=VOCAB,
        hidden_size=3584,
        samples=SampleSet(fingerprint="0", num_samples=len(records)),
        capture=Capture(topk=64, visual_topk=64),
        part_samples=part_samples or max(1, len(records)),
    )


class StateModel:
    """Final hidden states of a 27 × 27 image as a 7B model has them, and a small student's beside them.

    Smooth fields over a shared basis with a power-law spectrum, a common mean, noise, channels of log-normal
    scale and four of massive activation.
    """

    def __init__(self, *, width: int = 3584, student_width: int = 896, rank: int = 512) -> None:
        self.draw = torch.Generator().manual_seed(1)
        self.basis = torch.linalg.qr(self._normal(width, rank))[0].T
        self.student_basis = torch.linalg.qr(self._normal(student_width, rank))[0].T
        self.mean = self._normal(width) / width**0.5
        self.channels = torch.exp(0.5 * self._normal(width))
        self.channels[torch.randperm(width, generator=self.draw)[:4]] *= 25
        self.spectrum = torch.arange(1, rank + 1).float() ** -0.55

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher's states [729, D] and student's [729, D']."""
        rank, count = len(self.spectrum), 729
        fields = [
            smooth_field(27, n, blur, self.draw)
            for n, blur in ((rank // 4, 3.0), (rank // 4, 1.2), (rank // 2, 0.5))
        ]
        content = torch.cat(fields, 1) * self.spectrum
        teacher = content @ self.basis
        teacher = teacher / teacher.norm(dim=1).mean() + 0.55 * self.mean
        teacher = teacher + 0.35 * self._normal(count, len(self.mean)) / len(self.mean) ** 0.5
        teacher = teacher * self.channels * torch.exp(0.25 * self._normal(count, 1)) * 40
        student = (content * (1 + 0.3 * self._normal(rank))) @ self.student_basis
        student = student / student.norm(dim=1).mean()
        width = student.shape[1]
        student = (
            student
            + 0.4 * self._normal(1, width) / width**0.5
            + 0.5 * self._normal(count, width) / width**0.5
        )
        return teacher.bfloat16().float(), student


def relation_table(work: Path, *, images: int = 6) -> dict[str, Any]:
    """Bytes an image and error of the RDist gradient, after the cache's rounding, for both norms."""
    result: dict[str, Any] = {}
    model = StateModel()
    states = [model.sample() for _ in range(images)]
    for norm in ("none", "cosine"):
        exact = [relation(teacher, None, cosine=norm == "cosine") for teacher, _ in states]
        factors = [factor_relation(matrix, tolerance=RELATION_TOLERANCE, max_rank=256) for matrix in exact]
        tile = (Tile(offset=0, rows=27, columns=27, stride=27),)
        records = [
            _image_only(
                i, VisualRecord(f"{i:032x}", f"{i:064x}", 1, 729, tile, None, None, f.factor.numpy(), f.error)
            )
            for i, f in enumerate(factors)
        ]
        level = level_of(records).model_copy(update={"relation": Relation(tolerance=RELATION_TOLERANCE)})
        writer = CacheWriter.open(str(work / f"relation-{norm}"), level)
        seal = writer.write_part(0, records, first_sample=0, num_samples=images)
        size = sum(f.size_bytes for name, f in seal.files.items() if name.startswith("image_factor"))
        errors = []
        with CacheReader(str(work / f"relation-{norm}")) as cache:
            for i, (_, student) in enumerate(states):
                factor = cache.read_record(i).visual[0].factor
                assert factor is not None
                held = torch.from_numpy(np.ascontiguousarray(factor))
                errors.append(gradient_error(student, exact[i], held @ held.T, cosine=norm == "cosine"))
        prefix = "relation" if norm == "none" else "relation_cosine"
        result |= {
            f"{prefix}_kb_per_image": size / images / 1000,
            f"{prefix}_gradient_error": float(np.mean(errors)),
            f"{prefix}_gradient_error_max": float(np.max(errors)),
            f"{prefix}_rank": float(np.mean([f.factor.shape[1] for f in factors])),
        }
    return result


def _image_only(index: int, visual: VisualRecord) -> Record:
    spans = (Span(kind="prompt", start=0, stop=1), Span(kind="image", start=1, stop=1 + visual.num_positions))
    tokens = np.zeros(1 + visual.num_positions, np.int32)
    empty = TopK(
        np.empty(0, np.int32),
        np.empty((0, 64), np.int32),
        np.empty((0, 64), np.float32),
        np.empty((0, 1), np.float32),
        np.empty((0, 1), np.float32),
    )
    return Record(f"image-{index}", None, tokens, spans, empty, (visual,))


def gradient_error(student: torch.Tensor, exact: torch.Tensor, held: torch.Tensor, *, cosine: bool) -> float:
    """Relative error of the gradient of RDist in the student's states."""
    gradients = []
    for teacher in (exact, held):
        states = student.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(rdist(relation(states, None, cosine=cosine), teacher), states)
        gradients.append(gradient)
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def synthetic_open(work: Path, *, samples: int = 665_000, part_samples: int = 512) -> dict[str, float]:
    """Seconds to open a finalized cache of 665k samples, ids and offsets included."""
    manifest = level_of([]).model_copy(
        update={"samples": SampleSet(fingerprint="0", num_samples=samples), "part_samples": part_samples}
    )
    root = work / "large"
    CacheWriter.open(str(root), manifest)
    parts = -(-samples // part_samples)
    counts = np.full(parts * 26, 20, np.int32)
    counts[25::26] = 12
    part = np.repeat(np.arange(parts, dtype=np.int32), 26)
    counts[-26:] = 0
    counts[-26] = samples - int(counts[:-26].sum())
    blocks = np.stack([part, np.tile(np.arange(26, dtype=np.int32), parts), counts])
    names = [f"llava-{i:09d}" for i in range(samples)]
    table = np.array([[15] * samples, [7] * samples, [800] * samples], np.int32)
    text = np.frombuffer("".join(f"{n}caption" for n in names).encode(), np.uint8)
    directories = {p: f"{p:05d}-{'0' * 12}" for p in range(parts)}
    for p in range(parts):
        (root / "seals" / f"{p:05d}").mkdir()
        (root / "seals" / f"{p:05d}" / "zarr.json").write_bytes(b"{}")
    write_index(LocalStore(root), manifest, Index(directories, blocks, Names(text, table)))
    start = time.perf_counter()
    with CacheReader(str(root)) as cache:
        opened = time.perf_counter() - start
        ids = len(cache.sample_ids)
    assert ids == samples
    return {"open_665k_seconds": opened, "open_665k_with_ids_seconds": time.perf_counter() - start}
