"""A block in memory: flat arrays over all its samples, and views of them as records.

sample i ──> token_ids [T], spans, response rows [:, a:b].T, image indices ──> images
Decoded once per block; `record(i)` copies nothing.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache.bounds import find_fault
from common.cache.codec import IdCoding
from common.cache.image_files import unpack_image_files
from common.cache.shard import AGAIN
from common.cache.states import decode_factor, decode_hidden
from common.cache.tables import Rows, decode_rows
from common.errors import PartCorrupt
from common.record import Record, TopK, VisualRecord
from schemas.arrays import IMAGE_COLUMNS, KEY_BYTES, SAMPLE_COLUMNS, SHA_BYTES, SPAN_KINDS
from schemas.manifest import Manifest
from schemas.sample import Span, Tile

Array = NDArray[Any]

MAX_SCALE: Final = 2.0**64
"""No scale is larger: times a whole step of 32 bits, it is still a finite float32."""


class Block:
    """Whole samples, decoded together.

    Args:
        columns: Array name → its used values, rows last.
        codings: How each table's ids are coded.
        manifest: Says how to decode and what to refuse.
        where: Name of the block for messages.

    Raises:
        PartCorrupt: Lengths, offsets or ids contradict each other.
    """

    def __init__(
        self, columns: Mapping[str, Array], codings: Mapping[str, IdCoding], manifest: Manifest, where: str
    ) -> None:
        self._codings = codings
        self.where = where
        self._columns = columns
        self._manifest = manifest
        self.samples = _named(columns["sample_columns"], SAMPLE_COLUMNS, where)
        self.token_ids: NDArray[np.int32] = columns["sample_tokens"]
        self.images = _named(
            columns.get("image_columns", np.zeros((len(IMAGE_COLUMNS), 0), np.int32)), IMAGE_COLUMNS, where
        )
        self._offsets = self._check()
        self.response = self._rows("response", self.samples["num_rows"])
        self.visual = self._rows("visual", self.images["num_rows"])
        self._visual: dict[int, VisualRecord] = {}

    def __len__(self) -> int:
        """Samples in the block."""
        return len(self.samples["num_tokens"])

    def counts(self) -> dict[str, int]:
        """What the block holds, under the names of `PartSeal`: records, images, rows of both tables."""
        return {
            "num_records": len(self),
            "num_images": len(self.images["num_rows"]),
            "num_response_rows": int(self.samples["num_rows"].sum(dtype=np.int64)),
            "num_visual_rows": int(np.maximum(self.images["num_rows"], 0).sum(dtype=np.int64)),
        }

    def _check(self) -> dict[str, NDArray[np.int64]]:
        """Offsets of every ragged column, after proving that they end where the data ends."""
        samples, images, columns = self.samples, self.images, self._columns
        positive = np.maximum
        text = samples["id_bytes"].astype(np.int64) + positive(samples["kind_bytes"], 0)
        rank = positive(images["rank"], 0).astype(np.int64)
        sizes = {
            "sample_text": text,
            "sample_tokens": samples["num_tokens"],
            "sample_spans": samples["num_spans"],
            "sample_images": samples["num_images"],
            "response_positions": samples["num_rows"],
            "visual_positions": positive(images["num_rows"], 0),
            "image_tiles": images["num_tiles"],
            "image_keys": np.full(len(rank), KEY_BYTES + SHA_BYTES),
            "image_errors": np.ones(len(rank), np.int64),
            "image_factor": np.where(images["rank"] > 0, images["num_positions"], 0),
            "image_factor_scale": rank,
            "image_hidden": np.where(images["hidden_width"] >= 0, images["num_positions"], 0),
        }
        if "image_hidden_scale" in columns:
            sizes["image_hidden_scale"] = np.where(images["hidden_width"] >= 0, images["num_positions"], 0)
        if self._manifest.without_text or "sample_token_hashes" in columns:
            sizes["sample_token_hashes"] = np.full(len(text), SHA_BYTES)
        offsets = {}
        for name, counts in sizes.items():
            ends = np.zeros(len(counts) + 1, np.int64)
            np.cumsum(counts, out=ends[1:])
            held = columns[name].shape[-1] if name in columns else 0
            if (counts < 0).any() or ends[-1] != held:
                raise PartCorrupt(
                    f"{self.where}: {name} holds {held} values, its counts say {ends[-1]}; {AGAIN}"
                )
            offsets[name] = ends
        uses = columns.get("sample_images", np.empty(0, np.int32))
        if len(uses) and not 0 <= uses.min() <= uses.max() < len(rank):
            raise PartCorrupt(f"{self.where}: a sample names an image that the block lacks; {AGAIN}")
        self._check_shapes()
        if "image_files" in columns:
            unpack_image_files(columns, self.where)
        fault = find_fault(columns, self._manifest.vocab_rows)
        if fault is not None:
            raise PartCorrupt(f"{self.where}: {fault.owner} {fault.number} {fault.text}; {AGAIN}")
        return offsets

    def _check_shapes(self) -> None:
        """Refuse tables of other widths than their entries say, and scales that are no numbers."""
        columns, images = self._columns, self.images
        ranks = {name: len(columns.get(name, ())) for name in ("image_factor", "image_hidden")}
        good = len(columns["sample_spans"]) == 3 if "sample_spans" in columns else True
        good &= len(columns["image_tiles"]) == 4 if "image_tiles" in columns else True
        good &= int(images["rank"].max(initial=0)) <= ranks["image_factor"]
        good &= int(images["hidden_width"].max(initial=0)) <= ranks["image_hidden"]
        steps = "image_hidden" in columns and columns["image_hidden"].dtype == np.int16
        good &= steps == ("image_hidden_scale" in columns)
        for name in ("image_factor_scale", "image_hidden_scale", "image_errors"):
            good &= name not in columns or bool((np.abs(columns[name]) <= MAX_SCALE).all())
        if not good:
            raise PartCorrupt(f"{self.where}: its tables contradict each other; {AGAIN}")

    def _rows(self, table: str, counts: NDArray[np.int32]) -> Rows | None:
        owners = np.maximum(counts, 0)
        if not owners.any():
            return None
        columns = {
            k.removeprefix(f"{table}_"): v for k, v in self._columns.items() if k.startswith(f"{table}_")
        }
        try:
            return decode_rows(columns, self._codings[table], self._manifest, owners.tolist())
        except (IndexError, ValueError, KeyError) as error:
            raise PartCorrupt(f"{self.where}: {table} rows do not decode ({error!r}); {AGAIN}") from error

    def sample_id(self, index: int) -> str:
        """Id of the block's `index`-th sample."""
        start = int(self._offsets["sample_text"][index])
        return self._text(start, start + int(self.samples["id_bytes"][index]))

    def kind(self, index: int) -> str | None:
        """Kind of the block's `index`-th sample."""
        if self.samples["kind_bytes"][index] < 0:
            return None
        stop = int(self._offsets["sample_text"][index + 1])
        return self._text(stop - int(self.samples["kind_bytes"][index]), stop)

    def _text(self, start: int, stop: int) -> str:
        try:
            return bytes(self._columns["sample_text"][start:stop]).decode()
        except UnicodeDecodeError as error:
            raise PartCorrupt(f"{self.where}: a sample id is not UTF-8; {AGAIN}") from error

    def _slice(self, name: str, index: int) -> slice:
        ends = self._offsets[name]
        return slice(int(ends[index]), int(ends[index + 1]))

    def record(self, index: int) -> Record:
        """Everything about one sample, as views into the block."""
        spans = self._columns["sample_spans"][:, self._slice("sample_spans", index)].T.tolist()
        rows = self._slice("response_positions", index)
        return Record(
            sample_id=self.sample_id(index),
            kind=self.kind(index),
            token_ids=self.token_ids[self._slice("sample_tokens", index)],
            spans=tuple(Span(kind=SPAN_KINDS[k], start=a, stop=b) for k, a, b in spans),
            response=empty_topk(self._manifest)
            if self.response is None
            else self.response.topk(rows.start, rows.stop),
            visual=tuple(self.visual_record(int(i)) for i in self.image_indices(index)),
        )

    def token_hash(self, index: int) -> bytes | None:
        """SHA-256 of a sample's token ids as little-endian int32, where they were taken out; else None."""
        if "sample_token_hashes" not in self._columns:
            return None
        return bytes(self._columns["sample_token_hashes"][self._slice("sample_token_hashes", index)])

    def image_indices(self, index: int) -> NDArray[np.int32]:
        """Which of the block's images a sample uses, one per image span."""
        uses: NDArray[np.int32] = self._columns["sample_images"][self._slice("sample_images", index)]
        return uses

    def visual_record(self, image: int) -> VisualRecord:
        """Knowledge about the block's `image`-th image."""
        if image not in self._visual:
            self._visual[image] = self._unpack_visual(image)
        return self._visual[image]

    def _unpack_visual(self, image: int) -> VisualRecord:
        info = {name: int(values[image]) for name, values in self.images.items()}
        names = self._columns["image_keys"][self._slice("image_keys", image)]
        rows = self._slice("visual_positions", image)
        tiles = self._columns.get("image_tiles", np.empty((4, 0), np.int32))[
            :, self._slice("image_tiles", image)
        ].T.tolist()
        topk = None
        if info["num_rows"] >= 0:
            topk = (
                empty_topk(self._manifest) if self.visual is None else self.visual.topk(rows.start, rows.stop)
            )
        return VisualRecord(
            key=bytes(names[:KEY_BYTES]).hex(),
            image_sha256=bytes(names[KEY_BYTES:]).hex(),
            start=info["start"],
            num_positions=info["num_positions"],
            tiles=tuple(Tile(offset=o, rows=r, columns=c, stride=s) for o, r, c, s in tiles),
            topk=topk,
            hidden=self.hidden(image),
            factor=self.factor(image),
            factor_error=float(self._columns["image_errors"][image]),
        )

    def factor(self, image: int) -> NDArray[np.float32] | None:
        """[P, R] relation factor of an image, or None."""
        rank = int(self.images["rank"][image])
        if rank < 0:
            return None
        if rank == 0:
            return np.zeros((int(self.images["num_positions"][image]), 0), np.float32)
        cells = self._columns["image_factor"][:rank, self._slice("image_factor", image)]
        return decode_factor(
            cells, self._columns["image_factor_scale"][self._slice("image_factor_scale", image)]
        ).T

    def hidden(self, image: int) -> NDArray[np.float32] | None:
        """[P, D] final hidden states of an image, or None."""
        width = int(self.images["hidden_width"][image])
        if width < 0:
            return None
        cells = self._columns["image_hidden"][:width, self._slice("image_hidden", image)]
        scale = None
        if "image_hidden_scale" in self._columns:
            scale = self._columns["image_hidden_scale"][self._slice("image_hidden_scale", image)]
        hidden = decode_hidden(cells, scale).T
        if not np.isfinite(hidden).all():
            raise PartCorrupt(f"{self.where}: image {image} has hidden states that are no numbers; {AGAIN}")
        return hidden

    @cached_property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        return tuple(self.sample_id(i) for i in range(len(self)))


def _named(table: Array, names: tuple[str, ...], where: str) -> dict[str, NDArray[np.int32]]:
    if table.ndim != 2 or len(table) != len(names):
        raise PartCorrupt(
            f"{where}: a column table has shape {table.shape}, wanted {len(names)} rows; {AGAIN}"
        )
    return dict(zip(names, table, strict=True))


def empty_topk(manifest: Manifest) -> TopK:
    """No rows at all."""
    num_temperatures = len(manifest.capture.temperatures)
    return TopK(
        positions=np.empty(0, np.int32),
        token_ids=np.empty((0, manifest.capture.topk), np.int32),
        logprobs=np.empty((0, manifest.capture.topk), np.float32),
        log_tail=np.empty((0, num_temperatures), np.float32),
        logsumexp=np.empty((0, num_temperatures), np.float32),
    )
