"""Samples in, whatever their format: one interface."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import DataError
from schemas.sample import ImageRef, Sample

NUMBER_SUFFIX = "#number"
SHOW_PROGRESS_SAMPLES = 20_000


class SampleSource(ABC):
    """A fixed, ordered set of samples with random access. Picklable; safe to read from threads."""

    path: str
    """Where the data is: what `open_source` needs to find it again."""
    image_root: str | None
    """Directory that relative image paths start from; None when images come inline."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            DataError: This one sample cannot be used; others may.
            IndexError: There is no such place.
        """

    @abstractmethod
    def sample_ids(self) -> Sequence[str]:
        """Ids of all samples in order, those of unusable samples included."""

    @abstractmethod
    def image_keys(self) -> NDArray[np.int64]:
        """[S] hash of each sample's first image reference, 0 without one: groups samples of one image."""

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Hex digest over ids, turns and image references of all samples in order.

        Streams over the data once, about 0.1 ms a sample. Unusable samples count by id and reason, so
        mending one changes it.
        """
        digest = hashlib.sha256()
        quiet = len(self) < SHOW_PROGRESS_SAMPLES
        for index, sample_id in enumerate(tqdm(self.sample_ids(), desc="fingerprint", disable=quiet)):
            try:
                _absorb(digest, _identity(self[index]))
            except DataError as error:
                _absorb(digest, f"unusable\0{sample_id}\0{error.reason}".encode())
        return digest.hexdigest()


def _absorb(digest: "hashlib._Hash", content: bytes) -> None:
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _identity(sample: Sample) -> bytes:
    turns = [(turn.role, turn.parts) for turn in sample.turns]
    images = [_image_identity(image) for image in sample.images]
    return repr((sample.sample_id, turns, images)).encode("utf-8", "backslashreplace")


def _image_identity(image: ImageRef) -> str:
    return f"path:{image.path}" if image.data is None else f"sha256:{hashlib.sha256(image.data).hexdigest()}"


def find_image_root(directory: Path, first: ImageRef | None) -> str:
    """The data file's directory, or its `images` directory if only that holds the first image."""
    inside = directory / "images"
    if first is not None and first.path is not None:
        relative = Path(first.path)
        if not (directory / relative).exists() and (inside / relative).exists():
            return str(inside.absolute())
    return str(directory.absolute())
