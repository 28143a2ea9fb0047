"""One name, one image: a file that was replaced while its level was being dumped.

    this run      path ──> sha256 of the bytes read under it, for the paths read last
    earlier runs  a few sealed records, those at the border of an unsealed part among them
                  ──> sha256 kept ──compared──> the file as it is now

Inline images need none of this: their bytes are part of the data's own fingerprint.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.cache.reader import CacheReader
from common.data.source import SampleSource
from common.errors import DataError
from common.images import image_path, image_sha256
from schemas.sample import ImageRef

_PATHS_KEPT = 4096
_RECORDS_CHECKED = 16


class SeenFiles:
    """Bytes read under the last few paths. Safe to use from threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, path: Path | None, sha256: str, sample_id: str) -> None:
        """Record a file's hash and compare it with the last one.

        Raises:
            DataError: `image-changed`: the file had another hash before.
        """
        if path is None:
            return
        with self._lock:
            before, reader = self._known.setdefault(path, (sha256, sample_id))
            self._known.move_to_end(path)
            if len(self._known) > _PATHS_KEPT:
                self._known.popitem(last=False)
        if before != sha256:
            raise DataError(
                f"image {path} has sha256 {sha256[:12]} for sample {sample_id}, {before[:12]} for {reader}: "
                "it was replaced while it was being dumped; give each image a name of its own",
                reason="image-changed",
            )


def check_sealed_images(cache: str, source: SampleSource) -> None:
    """Compare image files with what a few sealed records saw, before a dump is resumed.

    Raises:
        DataError: `image-changed`: with the first file that is another one now.
    """
    rows = {name: row for row, name in enumerate(source.sample_ids())}
    with CacheReader(cache) as reader:
        for index in _chosen(reader):
            record = reader.read_record(index)
            if record.sample_id not in rows:
                continue
            for ref, image in zip(source[rows[record.sample_id]].images, record.visual, strict=False):
                found = _hash(ref, source.image_root)
                if found is not None and found != image.image_sha256:
                    raise DataError(
                        f"image {image_path(ref, source.image_root)} of sample {record.sample_id} has sha256 "
                        f"{found[:12]}, the sealed part of {cache} saw {image.image_sha256[:12]}: it was "
                        "replaced since; restore it, or dump to another --out",
                        reason="image-changed",
                    )


def _chosen(reader: CacheReader) -> list[int]:
    """Records evenly spaced, and those beside a part that is not sealed."""
    if not reader.num_samples:
        return []
    even = np.linspace(0, reader.num_samples - 1, _RECORDS_CHECKED).astype(int).tolist()
    return sorted({*even, *list(_borders(reader))[:_RECORDS_CHECKED]})


def _borders(reader: CacheReader) -> Iterator[int]:
    sealed, end = sorted(reader.seals), 0
    for part, following in pairwise([*sealed, -1]):
        first, end = end, end + reader.seals[part].num_records
        if end > first and following != part + 1:
            yield end - 1
        if end > first and part - 1 not in reader.seals:
            yield first


def _hash(ref: ImageRef, root: str | None) -> str | None:
    """Of the file as it is now; None where it cannot be read, which is reported elsewhere."""
    try:
        return image_sha256(ref, root)
    except DataError:
        return None
