"""Encodings of visual knowledge: relation factors and hidden states.

    factor     column j in steps of c / ‖a_j‖: the columns that carry the relation get the fine steps
               worst error: step / 2 a cell; relative error of A Aᵀ: measured, at most the tolerance given
    hidden     float32: 0 · bfloat16: 2⁻⁸ relative, 0 if the engine used it · int8: peak / 254

Why c / ‖a_j‖: R = Σ a_j a_jᵀ moves by about 2 ‖a_j‖ ‖δa_j‖ for a column, so equal harm to R means steps that
shrink as columns grow. Small columns need two or three bits a cell, the smallest none.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache.codec import from_bfloat16, to_bfloat16

Array = NDArray[Any]

TOLERANCE_SHARE: Final = 0.5
"""Part of the relation's tolerance that rounding may use; the rank uses the rest."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """Whole numbers and what one of them is worth."""

    values: NDArray[np.int32]
    """[P, R] or [P, D] whole steps."""
    scale: NDArray[np.float32]
    """One step a column (factor) or a row (hidden)."""


def encode_factor(factor: NDArray[np.float32], tolerance: float) -> Scaled:
    """Round a factor so that A Aᵀ keeps a relative (Frobenius) error of about `tolerance`.

    Args:
        factor: [P, R].
        tolerance: Relative error of the relation that rounding may cause.
    """
    exact = factor.astype(np.float64)
    norms = np.linalg.norm(exact, axis=0)
    relation = np.linalg.norm(exact.T @ exact)
    num_positions, rank = factor.shape
    spread = tolerance * relation * np.sqrt(6 / max(num_positions * rank, 1))
    scale = np.where(norms > 0, spread / np.where(norms > 0, norms, 1), 0)
    scale = np.maximum(scale, np.abs(exact).max(axis=0, initial=0.0) / 2**30).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float64)
    return Scaled(np.rint(exact / safe).astype(np.int32), scale)


def decode_factor(values: Array, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Factor [R, P] of whole steps [R, P]."""
    out: NDArray[np.float32] = values * scale[:, None]
    return out


def relation_error(factor: Array, rounded: Array) -> float:
    """‖A Aᵀ − B Bᵀ‖ / ‖A Aᵀ‖ (Frobenius), without forming either P × P matrix."""
    a, b = factor.astype(np.float64), rounded.astype(np.float64)
    norm = np.square(a.T @ a).sum()
    difference = norm + np.square(b.T @ b).sum() - 2 * np.square(a.T @ b).sum()
    return float(np.sqrt(max(difference, 0.0) / norm)) if norm > 0 else 0.0


def encode_hidden(hidden: NDArray[np.float32], encoding: str) -> tuple[Array, NDArray[np.float32] | None]:
    """Stored values [P, D], and a scale a position for int8."""
    if encoding == "bfloat16":
        return to_bfloat16(hidden), None
    if encoding == "float32":
        return hidden.astype(np.float32), None
    peak = np.abs(hidden).max(axis=1, initial=0.0)
    scale = (peak / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
    return np.rint(hidden / safe).astype(np.int16), scale


def decode_hidden(values: Array, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Hidden states of stored values [D, P]."""
    if scale is not None:
        out: NDArray[np.float32] = values * scale[None, :]
        return out
    return from_bfloat16(values) if values.dtype == np.uint16 else values
