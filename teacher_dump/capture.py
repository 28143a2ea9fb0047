"""Runs inside the vLLM worker: one forward pass gives all that a level keeps.

    flattened hidden states [tokens, D]
        │  rows of wanted positions, found by request and offset
        ├─ response rows ─┐
        ├─ visual rows   ─┴─> logits, `chunk_rows` at a time ─> top-k, logsumexp, tail
        └─ image spans ─────> states ─> relation factor, once the span is whole

Everything happens on the device; kept rows and factors leave it. A sample is given out only when its
token ids and image identities are the expected ones, the token under every row is the expected one,
and each wanted position was seen exactly once; otherwise it carries a `problem` in words.

Every rank of a tensor-parallel group walks the same chunks, because `compute_logits` gathers; the
rank that writes is the first one of the last pipeline stage.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group

from common.errors import EngineError
from common.relation import factor_relation, head_gram, relation
from common.topk import SparseRows, join_rows, sparse_rows
from teacher_dump.request import (
    EXTRA_ARG,
    ROWS_MISSING,
    Captured,
    CapturedImage,
    CapturedRows,
    CaptureRequest,
    CaptureSettings,
    hash_tokens,
    uniforms,
)
from teacher_dump.seams import Slice, attach, find_head, logits_dtype, mend_pipeline, real_rows
from teacher_dump.watch import Driver, end_with

Rows = NDArray[np.int64]


class RowBuffer:
    """Kept rows of one request, filled in whatever order the steps come."""

    def __init__(
        self, positions: NDArray[np.int32], num_positions: int, uniforms: NDArray[np.float64]
    ) -> None:
        self.uniforms = uniforms
        self.slots = np.full(num_positions, -1, np.int64)
        self.slots[positions] = np.arange(len(positions))
        self.counts = np.zeros(len(positions), np.int64)
        self.arrays: tuple[NDArray[Any], ...] | None = None

    def wanted(self, positions: Rows) -> Rows:
        """Those of `positions` that belong to the buffer."""
        return positions[self.slots[positions] >= 0]

    def put(self, positions: Rows, rows: tuple[NDArray[Any], ...]) -> None:
        """Store one row per position."""
        if self.arrays is None:
            self.arrays = tuple(np.zeros((len(self.counts), *each.shape[1:]), each.dtype) for each in rows)
        slots = self.slots[positions]
        self.counts[slots] += 1
        for array, values in zip(self.arrays, rows, strict=True):
            array[slots] = values

    @property
    def complete(self) -> bool:
        """Whether every position was seen exactly once."""
        return bool((self.counts == 1).all())


class Tracked:
    """A request under way in the worker."""

    def __init__(
        self, request: CaptureRequest, token_ids: NDArray[np.int32], settings: CaptureSettings
    ) -> None:
        self.request, self.token_ids = request, token_ids
        self.problem: tuple[str, str] | None = None
        length = len(token_ids)
        self.seen = np.zeros(length, bool)
        named = zip(request.images, request.visual_rows, strict=True)
        asked = [(f"{each.identifier} {each.start}", rows) for each, rows in named if rows is not None]
        self.response = _buffer([(request.key, request.response_rows)], length, settings)
        self.visual = _buffer(asked, length, settings)
        self.state_positions = _concatenate(
            np.arange(image.start, image.stop, dtype=np.int32)
            for image, rows in zip(request.images, request.visual_rows, strict=True)
            if settings.store != "none" and rows is not None
        )
        self.state_slots = np.full(length, -1, np.int64)
        self.state_slots[self.state_positions] = np.arange(len(self.state_positions))
        self.states: Tensor | None = None

    def keep_states(self, positions: Rows, states: Tensor) -> None:
        """Store hidden states of image positions, on the device."""
        if self.states is None:
            self.states = states.new_zeros(len(self.state_positions), states.shape[-1])
        self.states[torch.from_numpy(self.state_slots[positions]).to(states.device)] = states

    def fail(self, reason: str, problem: str) -> None:
        """Remember the first problem."""
        self.problem = self.problem or (reason, problem)


class CaptureExtension:
    """Mixed into the vLLM worker; its methods are called by name through `collective_rpc`."""

    def cascache_install(self, settings: dict[str, Any], driver: dict[str, Any]) -> dict[str, Any]:
        """Hook the model runner. Returns who this worker is, or `{"problem": …}`.

        Args:
            settings: Fields of `CaptureSettings`.
            driver: Fields of the `Driver` that asked; the worker ends with it.
        """
        end_with(Driver(**driver))
        runner = self.model_runner  # type: ignore[attr-defined]
        stage, group = get_pp_group(), get_tp_group()
        writer = stage.is_last_rank and group.rank_in_group == 0
        try:
            mend_pipeline(runner, stage.is_first_rank)
            gram = self._cascache_gram(runner.model, settings) if stage.is_last_rank else None
            self._cascache = Capture(CaptureSettings(**settings), runner.model, gram, writer)
            version = attach(
                runner, learn=self._cascache.learn, step=self._cascache.step, last_stage=stage.is_last_rank
            )
        except EngineError as error:
            return {"problem": str(error)}
        return {
            "runner": version,
            "writer": writer,
            "dtype": str(runner.model_config.dtype).removeprefix("torch."),
        }

    def _cascache_gram(self, model: Any, settings: dict[str, Any]) -> Tensor | None:
        if settings["store"] not in ("factor", "both") or settings["of"] != "logits":
            return None
        head = find_head(model)
        with torch.inference_mode():
            gram = head_gram(real_rows(head, settings["vocab_size"]))
            return get_tp_group().all_reduce(gram) if getattr(head, "tp_size", 1) > 1 else gram

    def cascache_mask_padding(self) -> None:
        """Give padding rows of the head no probability from here on: they are never drawn."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        inner, size = model.compute_logits, self._cascache.settings.vocab_size

        def compute_logits(*arguments: Any, **options: Any) -> Any:
            logits = inner(*arguments, **options)
            if logits is not None:  # as on ranks that do not sample
                logits[:, size:] = -math.inf
            return logits

        model.compute_logits = compute_logits

    def cascache_head_dtype(self, vocab_size: int) -> str | None:
        """What dtype the logits have, measured; None on the stages without a head.

        Args:
            vocab_size: Real tokens.
        """
        model, settings = self.get_model(), self.vllm_config.model_config  # type: ignore[attr-defined]
        if not get_pp_group().is_last_rank:
            return None
        return logits_dtype(
            model,
            like=torch.empty(0, settings.get_hidden_size(), dtype=settings.dtype, device=self.device),  # type: ignore[attr-defined]
            vocab_size=vocab_size,
        )

    def cascache_drain(self) -> list[dict[str, Any]]:
        """Finished results since the last call, in wire form; none from ranks that do not write."""
        finished, self._cascache.finished = self._cascache.finished, []
        return [each.to_wire() for each in finished]


class Capture:
    """The capture's own state, apart from vLLM's."""

    def __init__(self, settings: CaptureSettings, model: Any, gram: Tensor | None, writer: bool) -> None:
        self.settings, self.model, self.gram, self.writer = settings, model, gram, writer
        self.tracked: dict[str, Tracked] = {}
        self.finished: list[Captured] = []

    def learn(self, scheduler_output: Any) -> None:
        """Start tracking new requests that ask for capture, forget finished ones."""
        for name in scheduler_output.finished_req_ids:
            self.tracked.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            extra = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(EXTRA_ARG)
            if extra is not None and new.req_id not in self.tracked:
                self._track(CaptureRequest.from_extra(extra), new)

    def _track(self, request: CaptureRequest, new: Any) -> None:
        token_ids = np.asarray(new.prompt_token_ids, np.int32)
        problem = _mismatch(request, token_ids, new.mm_features)
        if problem is None:
            self.tracked[new.req_id] = Tracked(request, token_ids, self.settings)
        elif self.writer:
            self.finished.append(Captured(request.key, reason=problem[0], problem=problem[1]))

    @torch.inference_mode()
    def step(self, hidden: Tensor, input_ids: Tensor, slices: list[Slice]) -> None:
        """Keep what this step computed."""
        known = [(self.tracked[each.request_id], each) for each in slices if each.request_id in self.tracked]
        work = [(tracked, *_new_positions(tracked, piece)) for tracked, piece in known]
        work = [each for each in work if len(each[1])]
        if not work:
            return
        self._check_tokens(input_ids, work)
        self._keep_rows(hidden, [(tracked.response, p, r) for tracked, p, r in work], self.settings.topk)
        self._keep_rows(hidden, [(tracked.visual, p, r) for tracked, p, r in work], self.settings.visual_topk)
        if not self.writer:
            return
        for tracked, positions, rows in work:
            inside = tracked.state_slots[positions] >= 0
            if inside.any():
                tracked.keep_states(
                    positions[inside], hidden.index_select(0, _to(rows[inside], hidden.device))
                )
        for tracked, positions, _ in work:
            if positions[-1] + 1 == len(tracked.token_ids):
                self.finished.append(self._finish(tracked))

    def _check_tokens(self, input_ids: Tensor, work: list[tuple[Tracked, Rows, Rows]]) -> None:
        """Compare the token under every row with the one expected there: a shift by one cannot pass."""
        rows = np.concatenate([rows for _, _, rows in work])
        found = input_ids.index_select(0, _to(rows, input_ids.device)).cpu().numpy()
        at = 0
        for tracked, positions, _ in work:
            wrong = np.flatnonzero(found[at : at + len(positions)] != tracked.token_ids[positions])
            if len(wrong):
                first = int(wrong[0])
                tracked.fail(
                    "position-shift",
                    f"position {positions[first]} was computed from token {found[at + first]}, "
                    f"wanted {tracked.token_ids[positions[first]]}",
                )
            at += len(positions)

    def _keep_rows(self, hidden: Tensor, work: list[tuple[RowBuffer, Rows, Rows]], topk: int) -> None:
        """Top-k of the rows that the buffers want, in bounded chunks over the whole step."""
        wanted = [(buffer, positions, rows, buffer.slots[positions] >= 0) for buffer, positions, rows in work]
        rows = np.concatenate([rows[mask] for _, _, rows, mask in wanted])
        if not len(rows):
            return
        draws = np.concatenate([each.uniforms[each.slots[p[mask]]] for each, p, _, mask in wanted])
        chunks: list[SparseRows] = []
        for start in range(0, len(rows), self.settings.chunk_rows):
            chunk = _to(rows[start : start + self.settings.chunk_rows], hidden.device)
            logits = self.model.compute_logits(hidden.index_select(0, chunk))  # collective: every rank joins
            if self.writer:
                real = logits[:, : self.settings.vocab_size]
                chunks.append(self._sparse(real, topk, draws[start : start + self.settings.chunk_rows]))
        if not self.writer:
            return
        arrays = [each.cpu().numpy() for each in join_rows(chunks) if each is not None]
        at = 0
        for buffer, positions, _, mask in wanted:
            count = int(mask.sum())
            buffer.put(positions[mask], tuple(array[at : at + count] for array in arrays))
            at += count

    def _sparse(self, logits: Tensor, topk: int, draws: NDArray[np.float64]) -> SparseRows:
        settings = self.settings
        return sparse_rows(
            logits,
            topk,
            temperatures=settings.temperatures,
            mass=settings.topk_mass,
            uniforms=torch.from_numpy(draws).to(logits.device) if settings.draws else None,
        )

    def _finish(self, tracked: Tracked) -> Captured:
        request = tracked.request
        if not (
            tracked.response.complete
            and tracked.visual.complete
            and tracked.seen[tracked.state_positions].all()
        ):
            tracked.fail(ROWS_MISSING, "some wanted positions were never computed (prefix cache?)")
        response, visual = _rows(tracked.response, slice(None)), _rows(tracked.visual, slice(None))
        if not all(np.isfinite(rows.logsumexp).all() for rows in (response, visual) if rows is not None):
            tracked.fail("not-finite", "the teacher's logits are NaN or infinite; try another --dtype")
        if tracked.problem:
            return Captured(request.key, reason=tracked.problem[0], problem=tracked.problem[1])
        images, row, state = {}, 0, 0
        for index, (image, rows) in enumerate(zip(request.images, request.visual_rows, strict=True)):
            if rows is None:
                continue
            states = None
            if tracked.states is not None:
                states = tracked.states[state : state + image.stop - image.start]
                state += image.stop - image.start
            images[index] = self._image(_rows(tracked.visual, slice(row, row + len(rows))), states)
            row += len(rows)
        return Captured(request.key, response=response, images=images)

    def _image(self, rows: CapturedRows | None, states: Tensor | None) -> CapturedImage:
        settings = self.settings
        hidden = factor = None
        error = 0.0
        if states is not None and settings.store in ("hidden", "both"):
            hidden = states.float().cpu().numpy()
        if states is not None and settings.store in ("factor", "both"):
            matrix = relation(states, self.gram, cosine=settings.cosine)
            kept, error = factor_relation(matrix, tolerance=settings.tolerance, max_rank=settings.max_rank)
            factor = kept.cpu().numpy()
        return CapturedImage(rows, hidden, factor, error)


def _mismatch(request: CaptureRequest, token_ids: NDArray[np.int32], features: Any) -> tuple[str, str] | None:
    """Compare what vLLM is about to compute with what the driver meant: reason and words, or None."""
    found = [(each.identifier, *_embedded(each.mm_position)) for each in features]
    found.sort(key=lambda each: each[1])
    wanted = [(each.identifier, each.start, each.stop - each.start) for each in request.images]
    if found != wanted:
        return "image-mismatch", f"vLLM shows images {_brief(found)}, wanted {_brief(wanted)}"
    if len(token_ids) != request.num_positions or hash_tokens(token_ids) != request.token_sha256:
        return "prompt-mismatch", (
            f"vLLM expanded the prompt to {len(token_ids)} positions, which are not the "
            f"{request.num_positions} expected ones"
        )
    return None


def _embedded(place: Any) -> tuple[int, int]:
    """First position and length of what an image's states fill; some families put tokens around them."""
    if place.is_embed is None:
        return place.offset, place.length
    inside = torch.nonzero(place.is_embed)
    first, last = int(inside[0]), int(inside[-1])
    return place.offset + first, last - first + 1


def _brief(images: list[tuple[str, int, int]]) -> str:
    return "[" + ", ".join(f"{name[:8]} at {start}+{length}" for name, start, length in images) + "]"


def _new_positions(tracked: Tracked, piece: Slice) -> tuple[Rows, Rows]:
    """Positions this step computes for the first time, and their rows in the flattened batch."""
    positions = np.arange(piece.start, min(piece.start + piece.num_rows, len(tracked.token_ids)))
    positions = positions[~tracked.seen[positions]]  # preemption recomputes; the first time counts
    tracked.seen[positions] = True
    return positions, positions - piece.start + piece.offset


def _rows(buffer: RowBuffer, part: slice) -> CapturedRows | None:
    return None if buffer.arrays is None else CapturedRows(*(array[part] for array in buffer.arrays))


def _buffer(asked: list[tuple[str, NDArray[np.int32]]], length: int, settings: CaptureSettings) -> RowBuffer:
    """A buffer for named runs of rows; draws depend on the name, not on what is asked with it."""
    numbers = [uniforms(settings.seed, name, (len(rows), settings.draws)) for name, rows in asked]
    empty = np.empty((0, settings.draws))
    return RowBuffer(_concatenate(rows for _, rows in asked), length, np.concatenate([empty, *numbers]))


def _concatenate(rows: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *rows])


def _to(rows: Rows, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)
