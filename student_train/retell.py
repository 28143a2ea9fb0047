"""Token ids of a cache that was given away without its text, told again from the data.

    sample ──chat template, tokenizer, image sizes──> token ids ──sha256 = cached?──> record

The fingerprints of tokenizer and template were compared before; the hash proves each sequence.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache.block import Block
from common.cache.reader import CacheReader
from common.cache.rewrite import hash_tokens
from common.chat import ImageInput, to_prompt
from common.data.source import SampleSource
from common.errors import DataError, MismatchError
from common.images import decode_image, image_bytes
from common.record import Record


class Retold:
    """A cache whose records get their token ids from the data.

    Args:
        cache: The cache.
        source: The samples it was dumped from.
        processor: The student's processor.
    """

    def __init__(self, cache: CacheReader, source: SampleSource, processor: Any) -> None:
        self._cache, self._source, self._processor = cache, source, processor
        self._rows = {sample_id: row for row, sample_id in enumerate(source.sample_ids())}
        self._tokenizer = threading.Lock()  # a fast tokenizer must not be borrowed twice

    @property
    def kinds(self) -> Sequence[str | None]:
        """Kind of every sample."""
        return self._cache.kinds

    @property
    def block_offsets(self) -> NDArray[np.int64]:
        """[blocks + 1] first sample of every block."""
        return self._cache.block_offsets

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        """[S] length of every sample's sequence."""
        return self._cache.num_tokens

    def read_block(self, block: int) -> "RetoldBlock":
        """Decode a block."""
        return RetoldBlock(self, self._cache.read_block(block))

    def tell(self, record: Record, wanted: bytes | None) -> Record:
        """A record with its token ids.

        Raises:
            DataError: The sample is gone, or cannot be used.
            MismatchError: The data says something else than the teacher read.
        """
        row = self._rows.get(record.sample_id)
        if row is None:
            raise DataError(
                f"sample {record.sample_id!r} is not in {self._source.path}; point --data at the samples "
                f"that were dumped",
                reason="sample-missing",
            )
        sample = self._source[row]
        inputs = []
        for image in sample.images:
            encoded = image_bytes(image, self._source.image_root)
            pixels = decode_image(encoded, where=record.sample_id)
            inputs.append(ImageInput(hashlib.sha256(encoded).hexdigest(), pixels.height, pixels.width))
        with self._tokenizer:
            token_ids = to_prompt(self._processor, sample, inputs).token_ids
        if hash_tokens(token_ids) != wanted:
            raise MismatchError(
                f"sample {record.sample_id!r} of {self._source.path} is not what the teacher read: its token "
                f"ids have another hash; point --data at the samples that were dumped"
            )
        return replace(record, token_ids=token_ids)


class RetoldBlock:
    """A block whose records get their token ids from the data."""

    def __init__(self, cache: Retold, block: Block) -> None:
        self._cache, self._block = cache, block

    def record(self, index: int, /) -> Record:
        """Everything about one sample."""
        return self._cache.tell(self._block.record(index), self._block.token_hash(index))


def retold(cache: CacheReader, source: SampleSource, processor: Any) -> CacheReader | Retold:
    """The cache itself, or one that tells its text again where it has none."""
    return Retold(cache, source, processor) if cache.manifest.without_text else cache
