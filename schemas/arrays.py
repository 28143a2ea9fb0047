"""The arrays of a part: every name, axis, type and unit of the format in one table.

Every array of a part is stored as [B, C]: row b holds what block b has, one value after the other, and zeros
up to the longest block. An array of two axes lies rank by rank: all first choices, then all second ones.
Neighbours along a rank resemble each other, so they compress better and are summed and scaled at vector
speed. How much of a row is used, and how many ranks it has, stands in the part's attributes:
`arrays[name].lengths[b]` and `arrays[name].ranks`.

    Axes: B blocks, S samples, I images, N rows, K kept tokens, H temperatures, T tokens, D dictionary entries
"""

from dataclasses import dataclass
from typing import Final, Literal

Packing = Literal["small", "dense", "pairs", "trend", "smooth"]
"""What a codec should expect: `small` (few or byte-like values), `dense` (values to be entropy coded as they
are), `pairs` (as dense, and two numbers in one), `trend` (neighbours differ little),
`smooth` (some ranks do)."""

SAMPLE_COLUMNS: Final = ("num_tokens", "num_spans", "num_images", "num_rows", "id_bytes", "kind_bytes")
"""Columns of `sample_columns`; `kind_bytes` is −1 where a sample has no kind."""

IMAGE_COLUMNS: Final = ("start", "num_positions", "num_tiles", "num_rows", "rank", "hidden_width")
"""Columns of `image_columns`; `num_rows`, `rank` and `hidden_width` are −1 where nothing is kept."""

SPAN_KINDS: Final = ("image", "prompt", "response")
"""A span's kind is stored as its index here."""

KEY_BYTES: Final = 16
"""Bytes of an image's key, before the 32 bytes of its SHA-256, in `image_keys`."""

SHA_BYTES: Final = 32
"""Bytes of an image's SHA-256 in `image_keys`."""

SCALARS_PER_LOGIT_STEP: Final = 16
"""`scalar_steps` count in `logit_step / 16` nats: sixteen times finer than the kept logits."""

NO_VALUE: Final = -(2**31)
"""The entry of `scalar_steps` that stands for −inf."""

IdScope = Literal["owner", "block", "plain"]
"""Whose dictionary the codes index: one a sample (response) or image (visual), one a block, or none."""

ROW_TABLES: Final = ("response", "visual")
"""The two tables of rows; both hold the arrays of `ROW_ARRAYS` under their own prefix."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a part."""

    name: str
    """Array name inside the part; row arrays carry the table's name as prefix."""
    dtypes: tuple[str, ...]
    """Types allowed; the writer takes the first that holds the part's values."""
    axes: tuple[str, ...]
    """What one block holds; with two axes, the first is the rank axis."""
    packing: Packing
    """What its codec should expect."""
    optional: bool = False
    """Absent when nothing in the part needs it."""


SAMPLE_ARRAYS: Final = (
    ArraySpec("sample_columns", ("int32",), ("column", "S"), "small"),
    ArraySpec("sample_text", ("uint8",), ("byte",), "small"),
    ArraySpec("sample_tokens", ("int32",), ("T",), "dense"),
    ArraySpec("sample_spans", ("int32",), ("field", "span"), "small"),
    ArraySpec("sample_images", ("int32",), ("use",), "small"),
    ArraySpec("sample_token_hashes", ("uint8",), ("byte",), "small", optional=True),
)

IMAGE_ARRAYS: Final = (
    ArraySpec("image_columns", ("int32",), ("column", "I"), "small", optional=True),
    ArraySpec("image_keys", ("uint8",), ("byte",), "small", optional=True),
    ArraySpec("image_errors", ("float64",), ("I",), "small", optional=True),
    ArraySpec("image_tiles", ("int32",), ("field", "tile"), "small", optional=True),
    ArraySpec("image_factor", ("int16", "int32"), ("R", "P"), "smooth", optional=True),
    ArraySpec("image_factor_scale", ("float32",), ("R",), "dense", optional=True),
    ArraySpec("image_hidden", ("uint16", "float32", "int16"), ("D", "P"), "dense", optional=True),
    ArraySpec("image_hidden_scale", ("float32",), ("P",), "dense", optional=True),
    ArraySpec("image_file_sizes", ("int32",), ("file",), "small", optional=True),
    ArraySpec("image_files", ("uint8",), ("byte",), "small", optional=True),
)

IMAGE_FILE_ARRAYS: Final = ("image_file_sizes", "image_files")
"""The encoded images of a block, one for each SHA-256 in order of first occurrence in `image_keys`."""

ROW_ARRAYS: Final = (
    ArraySpec("positions", ("int32",), ("N",), "trend", optional=True),
    ArraySpec("scalar_steps", ("int32",), ("column", "N"), "dense", optional=True),
    ArraySpec("scalars", ("float32",), ("column", "N"), "dense", optional=True),
    ArraySpec("kept", ("uint16", "uint32"), ("N",), "small", optional=True),
    ArraySpec("level_pairs", ("uint16",), ("pair", "N"), "pairs", optional=True),
    ArraySpec("levels", ("uint16", "uint32"), ("K", "N"), "dense", optional=True),
    ArraySpec("logit_bits", ("uint16",), ("K", "N"), "dense", optional=True),
    ArraySpec("logprobs", ("float32",), ("K", "N"), "dense", optional=True),
    ArraySpec("codes", ("uint16", "uint32"), ("K", "N"), "dense", optional=True),
    ArraySpec("dictionary", ("int32",), ("D",), "trend", optional=True),
    ArraySpec("dictionary_sizes", ("int32",), ("owner",), "small", optional=True),
    ArraySpec("ids_by_rank", ("int32",), ("rank",), "trend", optional=True),
    ArraySpec("counts", ("uint16", "uint32"), ("K", "N"), "dense", optional=True),
)


def array_table() -> dict[str, ArraySpec]:
    """Every array a part may hold, by its full name."""
    table = {spec.name: spec for spec in SAMPLE_ARRAYS + IMAGE_ARRAYS}
    for rows in ROW_TABLES:
        table |= {f"{rows}_{spec.name}": spec for spec in ROW_ARRAYS}
    return table
