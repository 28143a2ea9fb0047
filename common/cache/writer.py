"""Writing a cache: whole parts, each final at once or not there at all.

    records ─ group into blocks ─ encode ─> .writing/00012-9f31c2 ─ fsync ─ rename ─> parts/00012-9f31c2
                                                                      └─ link ─> seals/00012/zarr.json

Killed anywhere before the link, a part does not exist and is dumped again. Two writers of one part each
have a directory of their own; `link` lets one of them create the seal, the other removes its directory.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.hashing import hash_file, hash_files
from common.cache.index import write_index
from common.cache.pack import pack_part, unique_images
from common.cache.part import write_part_files
from common.cache.places import open_store
from common.cache.reader import scan_parts
from common.cache.seals import read_manifest, read_seal, sealed_parts
from common.cache.shard import MAX_CHUNK_VALUES
from common.cache.store import Store, make_working
from common.errors import CacheError, DataError, MismatchError, PartMissing
from common.record import Record, VisualRecord
from schemas.manifest import Manifest, PartSeal, Quarantined

log = logging.getLogger(__name__)

BLOCK_ROWS: Final = 16_384
"""Rows a block aims at: enough to decode at full speed, few enough to shuffle in memory."""

MAX_BLOCK_SAMPLES: Final = 4_096
"""Samples a block holds at most, when they have few rows."""


FILE_BYTES_A_VALUE: Final = 16
"""Bytes of image files that weigh as much as one value of another array: a block holds up to 2²⁸."""


class CacheWriter:
    """Writes parts of one cache; any number of writers may share it.

    Use `CacheWriter.open`.
    """

    def __init__(self, store: Store, manifest: Manifest, *, block_rows: int = BLOCK_ROWS) -> None:
        self.store = store
        self.manifest = manifest
        self._identity = layout.identity_sha256(manifest)
        self._block_rows = block_rows

    @classmethod
    def open(cls, path: str, manifest: Manifest, *, block_rows: int = BLOCK_ROWS) -> "CacheWriter":
        """Create a cache, or resume the one at `path`.

        Args:
            path: Directory of the cache, or a URL such as `s3://bucket/l1`.
            manifest: What the caller is about to write.
            block_rows: Target number of rows per block.

        Raises:
            MismatchError: The cache has another identity; every differing field is named.
            CacheError: The directory holds something else.
        """
        store = open_store(path)
        _create(store, manifest)
        found = read_manifest(store)
        lines = layout.differing_fields(layout.identity_fields(found), layout.identity_fields(manifest))
        if lines:
            listing = "\n  ".join(lines)
            raise MismatchError(
                f"{path} was dumped with other settings:\n  {listing}\nuse the same, or another --out; "
                "fields that no setting changes come from another version: finish the dump with that one"
            )
        store.tidy()
        return cls(store, found, block_rows=block_rows)

    @property
    def sealed(self) -> frozenset[int]:
        """Parts that are final, by any writer."""
        return sealed_parts(self.store)

    def write_part(
        self,
        part: int,
        records: Sequence[Record],
        *,
        first_sample: int,
        num_samples: int,
        quarantined: Sequence[Quarantined] = (),
    ) -> PartSeal:
        """Write a part and seal it.

        Args:
            part: Index of the part.
            records: Its samples; neighbours that share an image share its knowledge.
            first_sample: Plan index of the part's first sample.
            num_samples: Samples of the plan in this part: records and quarantined ones.
            quarantined: Samples without a record, with the reason.

        Returns:
            The part's seal: another writer's, when that one was first.

        Raises:
            DataError: A record breaks the promises of `common.record`.
            CacheError: The disk refuses.
        """
        self._check(part, records, num_samples=num_samples, num_missing=len(quarantined))
        groups = list(group_blocks(records, self._block_rows))
        packed = pack_part(groups, self.manifest)
        name = layout.new_directory(part)
        working: Path | None = None
        try:
            working = make_working(self.store, name)
            write_part_files(working, packed, profile=self.manifest.encoding.profile)
            visual = [v for group in groups for v in unique_images(group).values()]
            seal = PartSeal(
                part=part,
                directory=name,
                identity_sha256=self._identity,
                first_sample=first_sample,
                num_samples=num_samples,
                num_records=len(records),
                num_images=len(visual),
                num_response_rows=sum(len(r.response.positions) for r in records),
                num_visual_rows=sum(len(v.topk.positions) for v in visual if v.topk is not None),
                errors=packed.errors,
                fidelity=_fidelity(records),
                quarantined=tuple(quarantined),
                files=hash_files(working),
            )
            return self._publish(working, seal)
        except OSError as error:
            if isinstance(error, CacheError):
                raise
            where = f"part {part} cannot be written to {self.store.name}"
            raise CacheError(f"{where} ({error}); repair the disk and run the same command again") from error
        finally:
            if working is not None:
                shutil.rmtree(working, ignore_errors=True)

    def _check(self, part: int, records: Sequence[Record], *, num_samples: int, num_missing: int) -> None:
        if not 0 <= part < max(1, self.manifest.num_parts):
            raise DataError(
                f"part {part} is outside the plan's {self.manifest.num_parts} parts", reason="plan"
            )
        if len(records) + num_missing != num_samples:
            raise DataError(
                f"part {part}: {len(records)} records and {num_missing} quarantined are not {num_samples}",
                reason="plan",
            )
        if len({r.sample_id for r in records}) != len(records):
            raise DataError(f"part {part}: a sample id occurs twice", reason="duplicate")

    def _publish(self, working: Path, seal: PartSeal) -> PartSeal:
        """Move a finished directory into place and seal it; the first seal wins."""
        key = f"{layout.PARTS}/{seal.directory}"
        self.store.add(working, key)
        if self.store.create(layout.seal_key(seal.part), layout.guarded_json(seal.model_dump(mode="json"))):
            return seal
        winner = read_seal(self.store, seal.part)  # a lost reply, then a retry, looks like defeat too
        if winner.directory != seal.directory:
            self.store.remove(key)
            log.warning("part %d was sealed by another writer meanwhile; its copy is kept", seal.part)
        return winner

    def finalize(self) -> None:
        """Write the index that makes opening fast.

        Raises:
            PartMissing: Parts are not sealed yet.
        """
        missing = sorted(set(range(self.manifest.num_parts)) - self.sealed)
        if missing:
            raise PartMissing(
                f"{self.store.name} lacks {len(missing)} of {self.manifest.num_parts} parts ({missing[:6]}); "
                f"run the same teacher-dump command to dump them"
            )
        write_index(self.store, self.manifest, scan_parts(self.store, self.manifest))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between parts."""


def _create(store: Store, manifest: Manifest) -> None:
    """Create the root, parts and seals groups, unless they are there; the first of several creators wins.

    Raises:
        CacheError: Something else is there.
    """
    names = store.names("")
    if layout.METADATA in names:
        return
    foreign = sorted(set(names) - layout.KNOWN_NAMES)
    if foreign:
        raise CacheError(f"{store.name} is not empty ({foreign[0]}, ...) and not a cache; give another --out")
    for name in (layout.PARTS, layout.SEALS):
        store.create(f"{name}/{layout.METADATA}", layout.group_json({}))
    store.create(layout.METADATA, layout.guarded_json(manifest.model_dump(mode="json")))


def group_blocks(records: Sequence[Record], block_rows: int) -> Iterator[Sequence[Record]]:
    """Cut a part's samples into blocks of about `block_rows` rows, whole samples each.

    A block ends only between two samples that share no image, so that its knowledge is stored once; a block
    may grow to twice its aim for that. No array of a block gets more values than a codec takes, whatever
    is shared.

    Raises:
        DataError: One sample alone has too many values.
    """
    widths = _widths(records)
    start, rows, seen, held = 0, 0, set[str](), np.zeros(len(widths), np.int64)
    for i, record in enumerate(records):
        fresh = {v.key: v for v in record.visual if v.key not in seen}
        added = _lengths(record, fresh.values())
        shares = len(fresh) < len({v.key for v in record.visual})
        full = rows + added[:2].sum() > block_rows * (2 if shares else 1) or i - start >= MAX_BLOCK_SAMPLES
        if i > start and (full or ((held + added) * widths > MAX_CHUNK_VALUES).any()):
            yield records[start:i]
            start, rows, seen, held = i, 0, set(), np.zeros(len(widths), np.int64)
            fresh = {v.key: v for v in record.visual}
            added = _lengths(record, fresh.values())
        if (added * widths > MAX_CHUNK_VALUES).any():
            most = int((added * widths).max())
            raise DataError(
                f"sample {record.sample_id!r} has {most} values in one array, a block takes "
                f"{MAX_CHUNK_VALUES}: keep fewer ids, a smaller rank, or no hidden states",
                reason="too-large",
            )
        rows += int(added[:2].sum())
        held += added
        seen |= fresh.keys()
    if start < len(records):
        yield records[start:]


def _lengths(record: Record, images: Iterable[VisualRecord]) -> NDArray[np.int64]:
    """Columns that a record adds to a block: rows of both tables, factor, hidden states, tokens, files."""
    added = [len(record.response.positions), 0, 0, 0, len(record.token_ids), 0]
    for image in images:
        added[1] += 0 if image.topk is None else len(image.topk.positions)
        added[2] += 0 if image.factor is None else len(image.factor)
        added[3] += 0 if image.hidden is None else len(image.hidden)
        added[5] += 0 if image.encoded is None else -(-len(image.encoded) // FILE_BYTES_A_VALUE)
    return np.array(added, np.int64)


def _widths(records: Sequence[Record]) -> NDArray[np.int64]:
    """Values a column of each array takes in this part: ranks are padded to the part's widest."""
    widest = [1, 1, 1, 1, 1, 1]
    for record in records:
        rows = [(0, record.response), *((1, v.topk) for v in record.visual)]
        sizes = [
            (t, max(r.token_ids.shape[1], 1 + 2 * r.log_tail.shape[1])) for t, r in rows if r is not None
        ]
        sizes += [(2, v.factor.shape[1]) for v in record.visual if v.factor is not None]
        sizes += [(3, v.hidden.shape[1]) for v in record.visual if v.hidden is not None]
        for array, width in sizes:
            widest[array] = max(widest[array], width)
    return np.array(widest, np.int64)


def _fidelity(records: Sequence[Record]) -> dict[str, float]:
    """How much of the teacher's mass the kept ids hold."""
    tables = {
        "response": [r.response.log_tail[:, 0] for r in records if len(r.response.positions)],
        "visual": [
            v.topk.log_tail[:, 0]
            for r in records
            for v in r.visual
            if v.topk is not None and len(v.topk.positions)
        ],
    }
    out = {}
    for table, tails in tables.items():
        if tails:
            mass = 1 - np.exp(np.concatenate(tails).astype(np.float64))
            for percent in (5, 50):
                out[f"{table}_mass_p{percent:02d}"] = float(np.percentile(mass, percent))
    return out


__all__ = [
    "BLOCK_ROWS",
    "CacheWriter",
    "group_blocks",
    "hash_file",
    "hash_files",
    "read_seal",
    "sealed_parts",
]
