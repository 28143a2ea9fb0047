"""Rows of a part's blocks to columns and back: which encoding, and the choice of dictionaries.

TableRows of B blocks ── choose (by trial on one block) ──> IdCoding ── encode ──> columns of B blocks
columns + IdCoding ── decode_rows ──> Rows [K, N]
"""

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

Array = NDArray[Any]
Columns = dict[str, Array]

_TRIAL_ROWS: Final = 16_384


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

    A dictionary of the whole part is tried on that block's codes with its share of the cost.
    """
    trial = blocks[0]
    steps = codec.quantise_logprobs(trial.rows.logprobs, trial.used, encoding.logit_step)
    may_tie = encoding.logits == "steps" and trial.rows.counts is None
    whole = _part_dictionary(blocks)
    best, best_bytes = IdCoding("plain", False), float("inf")
    scopes: tuple[IdScope, ...] = ("owner", "block", "part", "plain")
    for scope in scopes if len(blocks) > 1 else ("owner", "block", "plain"):
        code = _codes(trial, scope, whole)
        share = (
            len(trial.rows.positions) / sum(len(b.rows.positions) for b in blocks) if scope == "part" else 1.0
        )
        entries = whole if scope == "part" else code.dictionary
        fixed = share * _num_bytes(entries, trend=True) if len(entries) else 0.0
        for ties in (True, False) if may_tie else (False,):
            size = fixed + _num_bytes(_stored_codes(trial, code.codes, steps, ties)[0], trend=False)
            if size < best_bytes:
                best, best_bytes = IdCoding(scope, ties), size
    return best


def _num_bytes(values: Array, *, trend: bool) -> int:
    narrow = codec.smallest(values, ("uint16", "uint32"))
    return len(encode_chunk(narrow, coding_for("pcodec", narrow.dtype, "trend" if trend else "dense")))


def _part_dictionary(blocks: Sequence[TableRows]) -> NDArray[np.int32]:
    return codec.build_dictionary(np.concatenate([b.rows.token_ids[b.used] for b in blocks]))


def _codes(table: TableRows, scope: IdScope, whole: NDArray[np.int32]) -> IdCode:
    ids, used = table.rows.token_ids, table.used
    if scope == "plain":
        return IdCode(np.where(used, ids, 0).astype(np.int64), np.empty(0, np.int32), np.empty(0, np.int32))
    if scope == "part":
        return IdCode(codec.encode_ids(ids, used, whole), np.empty(0, np.int32), np.empty(0, np.int32))
    return codec.encode_ids_by_owner(ids, used, table.owners if scope == "owner" else (len(ids),))


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
    whole = _part_dictionary(held) if coding.scope == "part" else np.empty(0, np.int32)
    limit = (
        max(len(whole), *(int(b.rows.token_ids.max(initial=0)) for b in held))
        if coding.scope in ("part", "plain")
        else 0
    )
    columns = [
        {} if b is None else _encode_rows(b, coding, manifest.encoding, whole, limit, errors) for b in blocks
    ]
    if coding.scope == "part":
        columns[0]["dictionary"] = whole
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
    table: TableRows, coding: IdCoding, encoding: Encoding, whole: Array, limit: int, errors: dict[str, float]
) -> Columns:
    rows, used = table.rows, table.used
    code = _codes(table, coding.scope, whole)
    largest = max(limit, int(code.codes.max(initial=0)))
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
        columns["levels"] = codec.smallest(levels, ("uint16", "uint32"), limit=int(steps.max(initial=0)))
        columns["scalar_steps"] = codec.encode_scalars(scalars, encoding.logit_step)
        _note_step_errors(table, steps, scalars, columns["scalar_steps"], encoding.logit_step, errors)
    elif encoding.logits == "bfloat16":
        logits = np.where(used, rows.logprobs, 0) + np.where(used, rows.logsumexp[:, :1], 0)
        columns |= {"logit_bits": codec.to_bfloat16(logits.T), "scalars": scalars}
        _note(errors, "logprob_nats", np.abs(codec.from_bfloat16(columns["logit_bits"]) - logits.T))
    else:
        columns |= {"logprobs": np.where(used, rows.logprobs, 0).T.astype(np.float32), "scalars": scalars}
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
        columns: Arrays of the block; with a part's dictionary filled in.
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
    if len({num_rows, len(positions), scalars.shape[1], sum(owners)}) != 1 or logprobs.shape != codes.shape:
        raise ValueError(f"shapes disagree: {codes.shape}, {logprobs.shape}, {len(positions)} positions")
    token_ids = _decode_ids(columns, coding, owners, manifest.vocab_rows)
    if "kept" in columns:
        unused = np.arange(num_ranks)[:, None] >= columns["kept"][None, :]
        logprobs[unused] = -np.inf
        token_ids[unused] = 0
    counts = columns["counts"].astype(np.int32) if "counts" in columns else None
    num_temperatures = (len(scalars) - 1) // 2
    tails = scalars[1 : 1 + num_temperatures]
    return Rows(positions, token_ids, logprobs, tails, scalars[1 + num_temperatures :], counts)


def _exact_logprobs(columns: Mapping[str, Array], scalars: Array) -> NDArray[np.float32]:
    if "logit_bits" not in columns:
        return columns["logprobs"].copy()
    num_temperatures = (len(scalars) - 1) // 2
    logprobs: NDArray[np.float32] = codec.from_bfloat16(columns["logit_bits"]) - scalars[1 + num_temperatures]
    return logprobs


def _decode_ids(
    columns: Mapping[str, Array], coding: IdCoding, owners: Sequence[int], vocab: int
) -> NDArray[np.int32]:
    codes = columns["codes"]
    dictionary = columns.get("dictionary", np.empty(0, np.int32))
    highest, lowest = (codes, np.zeros(1)) if coding.scope == "plain" else (dictionary, dictionary)
    if highest.size and not 0 <= int(lowest.min()) <= int(highest.max()) < vocab:
        raise ValueError(f"ids outside the vocabulary of {vocab}")
    if coding.scope == "plain":
        return codes.astype(np.int32)
    if coding.scope == "part":
        return dictionary.take(codes)
    sizes = columns.get("dictionary_sizes", np.zeros(len(owners), np.int32))
    if (sizes < 0).any() or int(sizes.sum(dtype=np.int64)) != len(dictionary):
        raise ValueError("dictionary sizes disagree")
    return codec.decode_ids(
        codes, dictionary, sizes, owners if coding.scope == "owner" else (codes.shape[1],)
    )
