"""A cache with image files as its own sample source: what `--data` is for when there is no other data.

    sample_ids      those of the cache
    sample[i]       its images, inline; no turns: token ids come from the cache

Image files of a block are read together and kept for its other samples.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.cache.reader import BlockImages, CacheReader
from common.data.source import SampleSource
from common.errors import MismatchError
from schemas.sample import ImageRef, Sample

KEEP_BYTES: Final = 256 << 20
"""Memory for image files of blocks that come again."""


class OwnSamples(SampleSource):
    """The samples of a self-contained cache.

    Args:
        cache: An open cache.
        keep_bytes: Memory for image files.

    Raises:
        MismatchError: It keeps no image files.
    """

    def __init__(self, cache: CacheReader, *, keep_bytes: int = KEEP_BYTES) -> None:
        if not cache.manifest.with_images:
            raise MismatchError(f"{cache.store.name} keeps no image files; name its samples with --data")
        self.path, self.image_root = cache.store.name, None
        self._cache, self._keep_bytes = cache, keep_bytes
        self._blocks: OrderedDict[int, BlockImages] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._cache.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        block, place = self._cache.block_of(index)
        images = self._images(block)
        shown = tuple(ImageRef(data=images.files[sha256]) for sha256 in images.uses[place])
        return Sample(sample_id=self.sample_ids()[index], images=shown, turns=())

    def _images(self, block: int) -> BlockImages:
        with self._lock:
            found = self._blocks.get(block)
            if found is not None:
                self._blocks.move_to_end(block)
                return found
        found = self._cache.read_images(block)
        with self._lock:
            self._blocks[block] = found
            while (
                len(self._blocks) > 1 and sum(b.num_bytes for b in self._blocks.values()) > self._keep_bytes
            ):
                self._blocks.popitem(last=False)
        return found

    def sample_ids(self) -> Sequence[str]:
        """Ids of all records, in block order."""
        return self._cache.sample_ids

    def image_keys(self) -> NDArray[np.int64]:
        """[S] from the hash of each sample's first image, 0 without one."""
        uses = [u for block in range(self._cache.num_blocks) for u in self._cache.read_images(block).uses]
        return np.array([int(use[0][:15], 16) if use else 0 for use in uses], np.int64)
