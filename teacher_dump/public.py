"""An engine that keeps rows through vLLM's public `prompt_logprobs` alone, for a vLLM without the seams.

    entry p + 1 of prompt_logprobs  ──>  the row at position p: the n likeliest ids and their log-probs

It is slower, and it knows less. There are no hidden states, so no relations. There is no normaliser, so
log-probs are kept as the logits (one constant a row, which no softmax sees) and only temperature 1 is
known. The mass outside is what the kept ids leave of 1, right to float32's rounding of that sum. The
images are given under their hashes as ever, but no worker is asked which of them it computed.

Axes: N rows, K kept ids, n ids asked for, T positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_dump.engine import Engine, EngineSettings, Submission
from teacher_dump.request import ROWS_MISSING, Captured, CapturedImage, CapturedRows, CaptureSettings

_ROUNDING = 1e-6
"""Mass that a sum of float32 probabilities cannot tell from none."""


def choose_engine(settings: EngineSettings) -> Engine:
    """The engine that these settings ask for, not started."""
    return Engine(settings) if settings.hooks else PublicEngine(settings)


class PublicEngine(Engine):
    """vLLM as it is."""

    @property
    def num_asked(self) -> int:
        """n: the larger K, and room for padding rows of the head among the likeliest."""
        capture = self.settings.capture
        wanted = max(capture.topk, capture.visual_topk)
        return wanted + min(wanted, self.settings.vocab_rows - capture.vocab_size)

    def _arguments(self) -> dict[str, Any]:
        return {"max_logprobs": self.num_asked, "logprobs_mode": "raw_logprobs", **super()._arguments()}

    def _install(self) -> tuple[str, str]:
        return "public", str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def _mask_padding(self) -> None:
        """No worker takes orders here: all banned ids go with each question."""

    def _biased(self, banned: Sequence[int]) -> list[int]:
        return list(banned)

    def _wishes(self, submission: Submission, *, whole: bool) -> dict[str, Any]:
        return {"prompt_logprobs": self.num_asked, "flat_logprobs": True}

    def _collect(self, submitted: Sequence[Submission], outputs: Sequence[Any]) -> dict[str, Captured]:
        return {
            each.request.key: self._captured(each, output)
            for each, output in zip(submitted, outputs, strict=True)
        }

    def _captured(self, submission: Submission, output: Any) -> Captured:
        request, capture, flat = submission.request, self.settings.capture, output.prompt_logprobs
        width = self.num_asked + 1  # each row starts with the prompt's own next token
        if flat is None or len(flat.token_ids) != (request.num_positions - 1) * width:
            return Captured(request.key, "prompt_logprobs do not cover the prompt", ROWS_MISSING)
        token_ids = np.array(flat.token_ids, np.int32).reshape(-1, width)[:, 1:]
        logprobs = np.array(flat.logprobs, np.float64).reshape(-1, width)[:, 1:]

        def rows(positions: NDArray[np.int32], topk: int) -> CapturedRows:
            return keep_rows(token_ids[positions], logprobs[positions], topk, capture)

        try:
            response = rows(request.response_rows, capture.topk) if len(request.response_rows) else None
            images = {
                index: CapturedImage(
                    rows(wanted, capture.visual_topk) if len(wanted) else None, None, None, 0.0
                )
                for index, wanted in enumerate(request.visual_rows)
                if wanted is not None
            }
        except IndexError:
            return Captured(request.key, "prompt_logprobs say nothing of the last position", ROWS_MISSING)
        except ValueError as error:
            return Captured(request.key, str(error), "not-finite")
        return Captured(request.key, response=response, images=images)


def keep_rows(
    token_ids: NDArray[np.int32], logprobs: NDArray[np.float64], topk: int, capture: CaptureSettings
) -> CapturedRows:
    """The K likeliest real ids of each row, normalised without the padding rows that were given.

    Padding rows that were not given stay in the mass outside; each has less than the last given id.

    Args:
        token_ids: [N, n] ids in order of falling log-probability, padding rows among them.
        logprobs: [N, n] over the whole head.
        topk: K.
        capture: Its vocabulary and, if any, the mass after which no id is kept.

    Raises:
        ValueError: A row holds NaN, or fewer than K real ids.
    """
    real = token_ids < capture.vocab_size
    if np.isnan(logprobs).any():
        raise ValueError("the teacher's logits are NaN; try another --dtype")
    if (real.sum(-1) < topk).any():
        raise ValueError(f"padding rows of the head are likelier than the {topk} likeliest tokens")
    padding = np.exp(np.where(real, -np.inf, logprobs)).sum(-1)
    order = np.argsort(~real, axis=-1, kind="stable")[:, :topk]
    ids = np.take_along_axis(token_ids, order, -1)
    kept = np.take_along_axis(logprobs, order, -1) - np.log1p(-padding)[:, None]
    if capture.topk_mass is not None:
        mass = np.exp(kept)
        dropped = np.cumsum(mass, -1) - mass >= capture.topk_mass
        ids, kept = np.where(dropped, 0, ids), np.where(dropped, -np.inf, kept)
    return CapturedRows(
        ids.astype(np.int32),
        kept.astype(np.float32),
        _outside(kept, capture.vocab_size)[:, None],
        np.zeros((len(kept), 1), np.float32),
    )


def _outside(kept: NDArray[np.float64], vocab_size: int) -> NDArray[np.float32]:
    """[N] log of the mass outside; no id there has more than the least of the [N, K] kept ones."""
    finite = np.isfinite(kept)
    least = np.where(finite, kept, np.inf).min(-1)
    most = (vocab_size - finite.sum(-1)) * np.exp(least)
    with np.errstate(divide="ignore"):  # nothing is outside when everything is kept
        tail: NDArray[np.float64] = np.log(np.minimum(np.maximum(1 - np.exp(kept).sum(-1), _ROUNDING), most))
    return tail.astype(np.float32)
