"""Rows out of public log-probs: padding rows are taken out, and what is outside stays within its bounds."""

import numpy as np
import pytest
from pydantic import ValidationError

from teacher_dump.config import DumpConfig
from teacher_dump.public import keep_rows
from teacher_dump.request import CaptureSettings

SIZE, ROWS = 50, 58


def likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What vLLM would give of the whole head."""
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    ids = np.argsort(-logits, axis=-1)[:, :count]
    return ids.astype(np.int32), np.take_along_axis(logprobs, ids, -1)


def settings(topk: int, **changes: object) -> CaptureSettings:
    return CaptureSettings(topk=topk, visual_topk=topk, vocab_size=SIZE, **changes)  # type: ignore[arg-type]


def draw(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(40, ROWS)) * 3


def test_padding_rows_take_no_part():
    logits = draw()
    real = logits[:, :SIZE] - np.logaddexp.reduce(logits[:, :SIZE], axis=-1, keepdims=True)
    found = keep_rows(*likeliest(logits, ROWS), 12, settings(12))
    ids = np.argsort(-real, axis=-1)[:, :12]
    assert (found.token_ids == ids).all()
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(real, ids, -1), atol=1e-6)
    np.testing.assert_allclose(np.exp(found.log_tail[:, 0]), 1 - np.exp(found.logprobs).sum(-1), atol=1e-5)


def test_padding_rows_that_were_not_given_are_below_the_last_given_id():
    logits = draw()
    real = logits[:, :SIZE] - np.logaddexp.reduce(logits[:, :SIZE], axis=-1, keepdims=True)
    ids, logprobs = likeliest(logits, 24)
    found = keep_rows(ids, logprobs, 12, settings(12))
    error = np.take_along_axis(real, found.token_ids, -1) - found.logprobs
    tokens = np.exp(np.logaddexp.reduce(logits[:, :SIZE], -1) - np.logaddexp.reduce(logits, -1))
    bound = np.log1p((ROWS - SIZE) * np.exp(logprobs[:, -1]) / tokens)[:, None]
    assert (error >= -1e-6).all()
    assert (error <= bound + 1e-6).all()


def test_padding_rows_above_the_kept_ids_are_refused():
    logits = draw()
    logits[3, SIZE:] += 100
    with pytest.raises(ValueError, match="padding rows of the head"):
        keep_rows(*likeliest(logits, 10), 6, settings(6))


def test_mass_outside_is_never_more_than_the_ids_outside_can_have():
    logits = draw()
    logits[:, 0] += 60  # leaves less than float32 can tell from nothing
    found = keep_rows(*likeliest(logits, ROWS), 12, settings(12))
    most = (SIZE - 12) * np.exp(found.logprobs[:, -1].astype(np.float64))
    assert (np.exp(found.log_tail[:, 0].astype(np.float64)) <= most * (1 + 1e-5)).all()
    assert np.isfinite(found.log_tail).all()


def test_nothing_is_outside_when_everything_is_kept():
    found = keep_rows(*likeliest(draw(), ROWS), SIZE, settings(SIZE))
    assert np.isneginf(found.log_tail).all()


def test_ids_after_the_wanted_mass_join_what_is_outside():
    found = keep_rows(*likeliest(draw(), ROWS), 12, settings(12, topk_mass=0.7))
    mass = np.exp(found.logprobs.astype(np.float64))
    used = np.isfinite(found.logprobs)
    assert (used[:, 0]).all()
    assert (mass.sum(-1)[~used[:, -1]] >= 0.7).all()
    least = np.where(used, mass, np.inf).min(-1)
    assert ((mass.sum(-1) - least)[~used[:, -1]] < 0.7).all()
    np.testing.assert_allclose(np.exp(found.log_tail[:, 0]), 1 - mass.sum(-1), atol=1e-5)
    assert (found.token_ids[~used] == 0).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "needs --relation-store none"),
        ({"relation_store": "none", "temperature": (2.0,)}, "at temperature 1 only"),
        ({"relation_store": "none", "sampling": "random"}, "at temperature 1 only"),
    ],
)
def test_what_public_log_probs_cannot_give_is_refused(flags: dict[str, object], words: str):
    with pytest.raises(ValidationError, match=words):
        DumpConfig(capture="prompt-logprobs", **flags)  # type: ignore[arg-type]
    assert DumpConfig(capture="prompt-logprobs", relation_store="none").capture == "prompt-logprobs"
    assert DumpConfig(capture="prompt-logprobs", positions="response").positions == "response"
