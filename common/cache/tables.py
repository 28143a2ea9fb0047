"""Rows of a part's blocks to columns and back: which encoding, and the choice of dictionaries.

TableRows of B blocks ── choose (by trial on one block) ──> IdCoding ── encode ──> columns of B blocks
columns + IdCoding ── decode_rows ──> Rows [K, N]
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache import codec
from common.cache.codec import IdCode, IdCoding
from common.cache.shard import coding_for, encode_chunk
from common.record import TopK
from schemas.arrays import IdScope
from schemas.manifest import Encoding, Manifest

MASS_SLACK_NATS: Final = 0.05
"""How far above 0 a float32 may put the logarithm of a mass; encodings add their own error."""

BFLOAT16_ERROR: Final = 2.0**-8
"""Largest relative error of a rounded logit."""

Array = NDArray[Any]
Columns = dict[str, Array]


@dataclass(frozen=True, slots=True)
class TableRows:
    """All rows of one table of a block, of one width."""

    rows: TopK
    """The rows, checked."""
    owners: tuple[int, ...]
    """Rows of each sample (response) or image (visual), in order."""

    @property
    def used(self) -> NDArray[np.bool_]:
        """[N, K] which slots are kept ids."""
        return self.rows.logprobs > -np.inf


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of one table of a block, ranks first: [K, N]."""

    positions: NDArray[np.int32]
    """[N] position of each row in its sample's sequence."""
    token_ids: NDArray[np.int32]
    """[K, N] kept ids; 0 in unused slots."""
    logprobs: NDArray[np.float32]
    """[K, N] log-probs in nats; −inf in unused slots."""
    log_tail: NDArray[np.float32]
    """[H, N] log of the mass outside."""
    logsumexp: NDArray[np.float32]
    """[H, N] logsumexp at each temperature."""
    counts: NDArray[np.int32] | None
    """[K, N] draws, in the random sampling modes."""

    def topk(self, start: int, stop: int) -> TopK:
        """Rows `start:stop` as [N, K] views."""
        return TopK(
            positions=self.positions[start:stop],
            token_ids=self.token_ids[:, start:stop].T,
            logprobs=self.logprobs[:, start:stop].T,
            log_tail=self.log_tail[:, start:stop].T,
            logsumexp=self.logsumexp[:, start:stop].T,
            counts=None if self.counts is None else self.counts[:, start:stop].T,
        )


def choose_ids(blocks: Sequence[TableRows], encoding: Encoding) -> IdCoding:
    """The coding of ids that takes the fewest bytes, by trial on the part's first block of rows.

    The part's table of ranks counts with that block's share of it.
    """
    trial = blocks[0]
    steps = codec.quantise_logprobs(trial.rows.logprobs, trial.used, encoding.logit_step)
    may_tie = encoding.logits == "steps" and trial.rows.counts is None
    share = len(trial.rows.positions) / sum(len(b.rows.positions) for b in blocks)
    ids_by_rank = rank_ids(blocks)
    best, best_bytes = IdCoding("plain", ranked=False, ties=False), float("inf")
    scopes: tuple[IdScope, ...] = ("owner", "block", "plain")
    for ranked, scope in itertools.product((True, False), scopes):
        ids = codec.to_ranks(trial.rows.token_ids, ids_by_rank) if ranked else trial.rows.token_ids
        code = _codes(trial, ids, scope)
        fixed = share * _num_bytes(ids_by_rank, trend=True) if ranked else 0.0
        fixed += _num_bytes(code.dictionary, trend=True) if len(code.dictionary) else 0
        for ties in (True, False) if may_tie else (False,):
            size = fixed + _num_bytes(_stored_codes(trial, code.codes, steps, ties)[0], trend=False)
            if size < best_bytes:
                best, best_bytes = IdCoding(scope, ranked=ranked, ties=ties), size
    return best


def _num_bytes(values: Array, *, trend: bool) -> int:
    narrow = codec.smallest(values, ("uint16", "uint32"))
    coding = coding_for("pcodec", narrow.dtype, "trend" if trend else "dense")
    return len(encode_chunk(narrow.reshape(-1), narrow.size, 1 << 17, coding))


def rank_ids(blocks: Sequence[TableRows]) -> NDArray[np.int32]:
    """All ids of a part, frequent ones first."""
    return codec.build_dictionary(np.concatenate([b.rows.token_ids[b.used] for b in blocks]))


def _codes(table: TableRows, ids: NDArray[np.int32], scope: IdScope) -> IdCode:
    if scope == "plain":
        codes = np.where(table.used, ids, 0).astype(np.int64)
        return IdCode(codes, np.empty(0, np.int32), np.empty(0, np.int32))
    return codec.encode_ids_by_owner(ids, table.used, table.owners if scope == "owner" else (len(ids),))


def _stored_codes(table: TableRows, codes: Array, steps: Array, ties: bool) -> tuple[Array, Array]:
    """Codes [K, N] as stored, and levels [K, N]."""
    if ties:
        steps, codes = codec.order_ties(steps, codes, table.used)
    levels, across = codec.steps_to_levels(steps, table.used), np.ascontiguousarray(codes.T)
    return (codec.subtract_ties(across, levels) if ties else across), levels


def encode_table(
    blocks: Sequence[TableRows | None], coding: IdCoding, manifest: Manifest, errors: dict[str, float]
) -> list[Columns]:
    """Columns of every block of one table.

    Args:
        blocks: Rows of each block; None where a block has none.
        coding: How ids are coded, the same for the whole part.
        manifest: Says which encoding of logits.
        errors: Worst errors so far, raised in place.
    """
    held = [block for block in blocks if block is not None]
    ids_by_rank = rank_ids(held) if coding.ranked else None
    columns = [
        {} if b is None else _encode_rows(b, coding, manifest.encoding, ids_by_rank, errors) for b in blocks
    ]
    if ids_by_rank is not None:
        columns[0]["ids_by_rank"] = ids_by_rank
    _pair_all(columns)
    return columns


def _pair_all(blocks: Sequence[Columns]) -> None:
    """Pair the levels of every block, if those of all blocks fit."""
    levels = [columns["levels"] for columns in blocks if "levels" in columns]
    if any(piece.dtype != np.uint16 or piece.max(initial=0) > codec.MAX_PAIRED for piece in levels):
        return
    for columns in blocks:
        if "levels" in columns:
            columns["level_pairs"] = codec.pair_levels(columns.pop("levels"))


def _encode_rows(
    table: TableRows,
    coding: IdCoding,
    encoding: Encoding,
    ids_by_rank: NDArray[np.int32] | None,
    errors: dict[str, float],
) -> Columns:
    rows, used = table.rows, table.used
    ids = rows.token_ids if ids_by_rank is None else codec.to_ranks(rows.token_ids, ids_by_rank)
    code = _codes(table, ids, coding.scope)
    columns: Columns = {"positions": rows.positions, "kept": used.sum(axis=1)}
    if len(code.dictionary):
        columns |= {"dictionary": code.dictionary, "dictionary_sizes": code.sizes}
    scalars = np.concatenate([rows.logprobs[:, :1], rows.log_tail, rows.logsumexp], axis=1).T.astype(
        np.float32
    )
    codes = code.codes.T
    if encoding.logits == "steps":
        steps = codec.quantise_logprobs(rows.logprobs, used, encoding.logit_step)
        codes, levels = _stored_codes(table, code.codes, steps, coding.ties)
        columns["levels"] = codec.smallest(levels, ("uint16", "uint32"), limit=2 * int(levels.max(initial=0)))
        columns["scalar_steps"] = codec.encode_scalars(scalars, encoding.logit_step)
        _note_step_errors(table, steps, scalars, columns["scalar_steps"], encoding.logit_step, errors)
    elif encoding.logits == "bfloat16":
        logits = np.where(used, rows.logprobs, 0) + np.where(used, rows.logsumexp[:, :1], 0)
        columns |= {"logit_bits": codec.to_bfloat16(logits.T), "scalars": scalars}
        _note(errors, "logprob_nats", np.abs(codec.from_bfloat16(columns["logit_bits"]) - logits.T))
    else:
        columns |= {"logprobs": np.where(used, rows.logprobs, 0).T.astype(np.float32), "scalars": scalars}
    largest = int(code.codes.max(initial=0))
    columns["codes"] = codec.smallest(np.ascontiguousarray(codes), ("uint16", "uint32"), limit=largest)
    if rows.counts is not None:
        columns["counts"] = np.ascontiguousarray(rows.counts.T)
    return columns


def _note(errors: dict[str, float], name: str, error: Array) -> None:
    errors[name] = max(errors.get(name, 0.0), float(error.max(initial=0.0)))


def _note_step_errors(
    table: TableRows, steps: Array, scalars: Array, stored: Array, step: float, errors: dict[str, float]
) -> None:
    back = codec.decode_scalars(stored, step)
    finite = np.where(table.used, table.rows.logprobs, 0.0).astype(np.float64)
    decoded = np.where(table.used, back[0][:, None] - steps * step, 0.0)
    _note(errors, "logprob_nats", np.abs(decoded - finite))
    exact = np.where(np.isneginf(scalars), 0.0, scalars)
    _note(errors, "scalar_nats", np.abs(np.where(np.isneginf(back), 0.0, back) - exact))


def decode_rows(
    columns: Mapping[str, Array], coding: IdCoding, manifest: Manifest, owners: Sequence[int]
) -> Rows:
    """Decode one table's arrays (names without the table's prefix).

    Args:
        columns: Arrays of the block; `ids_by_rank` is the part's.
        coding: How ids are coded.
        manifest: Says how logits are.
        owners: Rows of each sample or image.

    Raises:
        IndexError: A code is outside its dictionary.
        ValueError: Ids outside the vocabulary, or shapes that disagree.
        KeyError: An array is missing.
    """
    codes, positions, encoding = columns["codes"], columns["positions"], manifest.encoding
    num_ranks, num_rows = codes.shape
    if encoding.logits == "steps":
        scalars = codec.decode_scalars(columns["scalar_steps"], encoding.logit_step)
        pairs = columns.get("level_pairs")
        levels = columns["levels"] if pairs is None else codec.unpair_levels(pairs, num_ranks)
        logprobs = codec.decode_levels(levels, scalars[0], encoding.logit_step)
        if coding.ties:
            codec.add_ties(codes, levels)
    else:
        scalars = columns["scalars"]
        logprobs = _exact_logprobs(columns, scalars)
    lengths = {num_rows, len(positions), scalars.shape[1], sum(owners), len(columns.get("kept", positions))}
    num_temperatures = len(manifest.capture.temperatures)
    fits = len(scalars) == 1 + 2 * num_temperatures and columns.get("counts", codes).shape == codes.shape
    if len(lengths) != 1 or logprobs.shape != codes.shape or not fits:
        raise ValueError(f"shapes disagree: {codes.shape}, {logprobs.shape}, {len(positions)} positions")
    _check_values(scalars, logprobs, num_temperatures, encoding)
    _check_kept(
        columns, scalars[0] if encoding.logits == "steps" else logprobs.min(axis=0, initial=0), num_ranks
    )
    token_ids = _decode_ids(columns, coding, owners, manifest.vocab_rows)
    if "kept" in columns:
        unused = np.arange(num_ranks)[:, None] >= columns["kept"][None, :]
        logprobs[unused] = -np.inf
        token_ids[unused] = 0
    counts = columns["counts"].astype(np.int32) if "counts" in columns else None
    tails = scalars[1 : 1 + num_temperatures]
    return Rows(positions, token_ids, logprobs, tails, scalars[1 + num_temperatures :], counts)


def _check_values(scalars: Array, logprobs: Array, num_temperatures: int, encoding: Encoding) -> None:
    """Refuse what is no probability. Levels only fall, so the first rank bounds the others.

    Raises:
        ValueError: A log of a mass above 1, an infinite logsumexp, or NaN.
    """
    tops = logprobs[:1] if encoding.logits == "steps" else logprobs
    masses, sums = scalars[: 1 + num_temperatures], scalars[1 + num_temperatures :]
    slack = MASS_SLACK_NATS + (encoding.logit_step / 16 if encoding.logits == "steps" else 0)
    rounded = BFLOAT16_ERROR * np.abs(sums[0]) if encoding.logits == "bfloat16" else 0.0
    good = bool(masses.max(initial=-np.inf) <= slack) and bool(
        (tops.max(axis=0, initial=-np.inf) <= slack + rounded).all()
    )
    if not good or not np.isfinite(sums).all():
        raise ValueError("values that are no log-probabilities")


def _check_kept(columns: Mapping[str, Array], lowest: Array, num_ranks: int) -> None:
    """Refuse rows that keep more ids than there are, and kept ids of no probability.

    Raises:
        ValueError: A row is one of these.
    """
    kept, nothing = columns.get("kept"), np.isneginf(lowest)
    if kept is not None:
        nothing &= kept > 0
    if (kept is not None and int(kept.max(initial=0)) > num_ranks) or nothing.any():
        raise ValueError(f"a row keeps more than its {num_ranks} ids, or ids of no probability")


def _exact_logprobs(columns: Mapping[str, Array], scalars: Array) -> NDArray[np.float32]:
    if "logit_bits" not in columns:
        return columns["logprobs"].copy()
    num_temperatures = (len(scalars) - 1) // 2
    with np.errstate(invalid="ignore", over="ignore"):  # what is no number is refused by who calls
        logprobs: NDArray[np.float32] = (
            codec.from_bfloat16(columns["logit_bits"]) - scalars[1 + num_temperatures]
        )
    return logprobs


def _decode_ids(
    columns: Mapping[str, Array], coding: IdCoding, owners: Sequence[int], vocab: int
) -> NDArray[np.int32]:
    """Undo `to_ranks` and the dictionaries, ids proven to be below `vocab`."""
    codes = columns["codes"]
    if coding.scope == "plain":
        if coding.ranked:
            return codec.look_up(_checked_ids(columns["ids_by_rank"], vocab), codes)
        return _checked_ids(codes, vocab).astype(np.int32)
    dictionary = columns.get("dictionary", np.empty(0, np.int32))
    sizes = columns.get("dictionary_sizes", np.zeros(len(owners), np.int32))
    if (sizes < 0).any() or int(sizes.sum(dtype=np.int64)) != len(dictionary):
        raise ValueError("dictionary sizes disagree")
    if coding.ranked:
        ids_by_rank = _checked_ids(columns["ids_by_rank"], vocab)
        dictionary = ids_by_rank.take(_checked_ids(dictionary, len(ids_by_rank)))
    rows = owners if coding.scope == "owner" else (codes.shape[1],)
    return codec.decode_ids(codes, _checked_ids(dictionary, vocab), sizes, rows)


def _checked_ids(ids: Array, vocab: int) -> Array:
    """Ids proven to count from 0 to below `vocab`: a negative one would count from the end."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(f"ids outside the vocabulary of {vocab}")
    return ids
