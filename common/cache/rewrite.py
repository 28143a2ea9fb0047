"""Single arrays of a part written anew, when something is left out of it.

    image_columns    counts of what is left out become −1: nothing is kept
    sample_tokens    ids outside images become 0; sample_token_hashes says what they were

An array is its two files; what is read of the source is proven before.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.shard import (
    SHARD_NAME,
    array_json,
    coding_for,
    decode_chunk,
    encode_shard,
    parse_array_json,
)
from schemas.arrays import IMAGE_COLUMNS, SAMPLE_COLUMNS, SPAN_KINDS, array_table

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class PartArrays:
    """The arrays of a part, read one at a time."""

    read: Callable[[str], bytes]
    """A file of the part, proven."""
    used: Mapping[str, Mapping[str, Any]]
    """Name → `lengths` and `ranks`, from the part's attributes."""
    profile: str
    """`pcodec` or `portable`."""

    def pieces(self, name: str) -> list[Array]:
        """The values of every block, flat."""
        meta = parse_array_json(self.read(f"{name}/{layout.METADATA}"), name)
        shard = self.read(f"{name}/{SHARD_NAME}")
        index = np.frombuffer(shard[-meta.num_blocks * 16 - 4 : -4], "<u8").reshape(-1, 2).tolist()
        ranks = int(self.used[name].get("ranks", 1))
        pieces = []
        for (offset, length), used in zip(index, self.used[name]["lengths"], strict=True):
            values = np.empty(ranks * int(used), meta.dtype)
            decode_chunk(shard[offset : offset + length], meta, values, name)
            pieces.append(values)
        return pieces

    def files(self, name: str, pieces: Sequence[Array]) -> dict[str, bytes]:
        """The two files of an array."""
        coding = coding_for(self.profile, pieces[0].dtype, array_table()[name].packing)
        data, capacity = encode_shard(pieces, [max(1, piece.size) for piece in pieces], coding)
        document = array_json(pieces[0].dtype, (len(pieces), capacity), coding)
        return {f"{name}/{SHARD_NAME}": data, f"{name}/{layout.METADATA}": document}


def without_counts(arrays: PartArrays, columns: Sequence[str]) -> dict[str, bytes]:
    """The table of images with some columns at −1."""
    rows = [IMAGE_COLUMNS.index(column) for column in columns]
    pieces = arrays.pieces("image_columns")
    for piece in pieces:
        piece.reshape(len(IMAGE_COLUMNS), -1)[rows] = -1
    return arrays.files("image_columns", pieces)


def without_text(arrays: PartArrays) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Token ids of images only, and the hash of each sample's whole sequence.

    Returns:
        Files, and the part's attribute for the array of hashes.
    """
    tokens, hashes = arrays.pieces("sample_tokens"), []
    tables = zip(tokens, arrays.pieces("sample_columns"), arrays.pieces("sample_spans"), strict=True)
    for ids, columns, spans in tables:
        table = dict(zip(SAMPLE_COLUMNS, columns.reshape(len(SAMPLE_COLUMNS), -1), strict=True))
        ends = np.cumsum(table["num_tokens"], dtype=np.int64)
        starts = ends - table["num_tokens"]
        digests = [hash_tokens(ids[a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        hashes.append(np.frombuffer(b"".join(digests), np.uint8))
        kinds, first, last = spans.reshape(3, -1).astype(np.int64)
        base = np.repeat(starts, table["num_spans"])
        hidden = kinds != SPAN_KINDS.index("image")
        for a, b in zip((base + first)[hidden].tolist(), (base + last)[hidden].tolist(), strict=True):
            ids[a:b] = 0
    name = "sample_token_hashes"
    used = {"dtype": "uint8", "lengths": [piece.size for piece in hashes]}
    return arrays.files("sample_tokens", tokens) | arrays.files(name, hashes), used


def hash_tokens(token_ids: Array) -> bytes:
    """SHA-256 over a sequence as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).digest()
