"""Images of a record as the student's model wants them, checked against what the teacher saw.

    sample ──read──> bytes ──sha256 = cached?──> processor ──image tokens = cached span?──> Pixels

Both checks name the sample, what was found and what was wanted. Pixels that come again (epochs,
several questions an image) are kept in memory up to a bound.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from common.data.source import SampleSource
from common.errors import DataError, MismatchError
from common.grids import ImageLayout, image_layout
from common.images import decode_image, image_bytes
from common.record import Record
from schemas.sample import Sample
from student_train.recent import Recent

_TEXT_KEYS: Final = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"})


@dataclass(frozen=True, slots=True)
class Pixels:
    """One sample's images, preprocessed."""

    tensors: Mapping[str, Tensor]
    """Image keyword arguments of the model's forward; the first axis counts images or patches."""
    num_tokens: tuple[int, ...]
    """Positions that each image takes."""
    layouts: tuple[ImageLayout, ...] = ()
    """The same with patch grids, where the student has image positions of its own."""

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class PixelLoader:
    """Reads, checks and preprocesses the images of records."""

    def __init__(
        self, source: SampleSource, processor: Any, *, keep_bytes: int, own_grid: bool = False
    ) -> None:
        """Open the data.

        Args:
            source: The samples that the cache was dumped from.
            processor: The student's processor.
            keep_bytes: Memory for pixels that come again.
            own_grid: Whether images may take another number of positions than in the cache.
        """
        self._source = source
        self._processor = processor
        self._own_grid = own_grid
        self._rows = {sample_id: row for row, sample_id in enumerate(source.sample_ids())}
        self._recent: Recent[tuple[str, ...], Pixels] = Recent(
            capacity=keep_bytes, weigh=lambda pixels: pixels.size_bytes
        )

    def load(self, record: Record) -> Pixels | None:
        """Return a record's images, or None for a text-only sample.

        Raises:
            DataError: The sample is gone, or an image cannot be read.
            MismatchError: An image is not the one that the teacher saw, or takes another number of positions.
        """
        num_spans = sum(span.kind == "image" for span in record.spans)
        if num_spans != len(record.visual):
            raise MismatchError(
                f"sample {record.sample_id!r} has {num_spans} image spans, the cache names "
                f"{len(record.visual)} images: the student would not see what the teacher saw; dump again"
            )
        if not record.visual:
            return None
        hashes = tuple(image.image_sha256 for image in record.visual)
        pixels = self._recent.get(hashes, lambda: self._load(record.sample_id, hashes))
        wanted = tuple(image.num_positions for image in record.visual)
        if pixels.num_tokens != wanted and not self._own_grid:
            raise MismatchError(
                f"sample {record.sample_id!r}: the student's processor gives its images {pixels.num_tokens} "
                f"positions, the cache has {wanted}; use the teacher's image settings, dump again, or "
                f"train on the student's own positions with --image-grid own"
            )
        return pixels

    def _load(self, sample_id: str, hashes: tuple[str, ...]) -> Pixels:
        sample = self._find(sample_id)
        if len(sample.images) < len(hashes):  # more: a conversation that the teacher's answers cut short
            raise MismatchError(
                f"sample {sample_id!r} has {len(sample.images)} images, the cache {len(hashes)}; "
                f"point --data at the samples that were dumped"
            )
        images = []
        for number, (image, wanted) in enumerate(zip(sample.images, hashes, strict=False)):
            where = f"sample {sample_id!r}, image {number} ({image.path or 'inline'})"
            encoded = image_bytes(image, self._source.image_root)
            found = hashlib.sha256(encoded).hexdigest()
            if found != wanted:
                raise MismatchError(
                    f"{where} has sha256 {found[:12]}, the teacher saw {wanted[:12]}; "
                    f"restore the image, or dump again"
                )
            images.append(decode_image(encoded, where=where))
        pixels = preprocess(self._processor, images)
        return replace(pixels, layouts=self._layouts(images, pixels)) if self._own_grid else pixels

    def _layouts(self, images: list[Any], pixels: Pixels) -> tuple[ImageLayout, ...]:
        """Patch grids of images; none where the grid that is known does not cover the positions taken."""
        known = [image_layout(self._processor, image.height, image.width) for image in images]
        return tuple(
            layout if layout.num_positions == num else ImageLayout(num, ())
            for layout, num in zip(known, pixels.num_tokens, strict=True)
        )

    def _find(self, sample_id: str) -> Sample:
        row = self._rows.get(sample_id)
        if row is None:
            raise DataError(
                f"sample {sample_id!r} is in the cache but not in the data ({len(self._rows)} samples); "
                f"point --data at the samples that were dumped",
                reason="sample-missing",
            )
        return self._source[row]


def preprocess(processor: Any, images: list[Any]) -> Pixels:
    """Turn one sample's images into model inputs.

    Args:
        processor: A transformers multi-modal processor.
        images: Decoded images, in order.
    """
    text = "\n".join([processor.image_token] * len(images))
    features = processor(text=[text], images=images, return_tensors="pt")
    marks = features["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    tensors = {name: value for name, value in features.items() if name not in _TEXT_KEYS}
    return Pixels(tensors, _run_lengths(marks.numpy()))


def _run_lengths(marks: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, ...]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]])))
    return tuple(int(length) for length in edges[1::2] - edges[::2])


def join(pixels: list[Pixels]) -> dict[str, Tensor]:
    """Put several samples' images behind one another; ragged crops are padded with zeros.

    Args:
        pixels: One per sample that has images.
    """
    names = pixels[0].tensors if pixels else ()
    return {name: _concatenate([each.tensors[name] for each in pixels]) for name in names}


def _concatenate(tensors: list[Tensor]) -> Tensor:
    longest = tuple(max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True))
    if all(tensor.shape[1:] == longest for tensor in tensors):
        return torch.cat(tensors)
    padded = []
    for tensor in tensors:
        room = tensor.new_zeros((len(tensor), *longest))
        room[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(room)
    return torch.cat(padded)
