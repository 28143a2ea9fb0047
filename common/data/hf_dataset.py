"""Hugging Face data sets, saved on disk or on the hub, with a `messages` or `conversations` column.

Columns: `messages` or `conversations`; `image` or `images` (encoded bytes or paths; never decoded
here, so that hashes are of the files themselves); optionally `id`, `kind`, `question_type`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data import entries
from common.data.index import Duplicates, Strings, unique_ids
from common.data.source import NUMBER_SUFFIX, SampleSource
from common.errors import ConfigError
from schemas.sample import Sample

COLUMNS = ("id", "messages", "conversations", "image", "images", "kind", "question_type")


def open_saved(path: Path, *, image_root: str | None, duplicates: Duplicates = "refuse") -> "HfDataset":
    """Open a directory that `datasets.save_to_disk` wrote; of several splits, the only one or `train`.

    Raises:
        ConfigError: It is no such directory, holds other splits only, or lacks the columns.
    """
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{path} is no directory from datasets.save_to_disk ({error}); name the data file in it"
        ) from error
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
        if split is None:
            raise ConfigError(
                f"{path} holds splits {', '.join(loaded)}; name one: {path}/{next(iter(loaded))}"
            )
        loaded, path = loaded[split], path / split
    name = str(path.resolve()) + (NUMBER_SUFFIX if duplicates == "number" else "")
    return HfDataset(loaded, path=name, image_root=image_root or str(path.resolve()), duplicates=duplicates)


def open_hub(path: str, *, image_root: str | None) -> "HfDataset":
    """Open `hf:owner/name[:split][#number]` from the hub, or from its local copy when offline.

    Raises:
        ConfigError: The name is malformed, there is no such data set or split, or it lacks the columns.
    """
    name = path.removesuffix(NUMBER_SUFFIX)
    repository, _, split = name.removeprefix("hf:").partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"{path!r} names no data set; wanted hf:owner/name or hf:owner/name:split")
    datasets = _library()
    try:
        loaded = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {path}: {error}; check name, split, network and HF_TOKEN") from error
    return HfDataset(
        loaded, path=path, image_root=image_root, duplicates="refuse" if name == path else "number"
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face data sets need `datasets`; install cascache[data]") from error
    return datasets


class HfDataset(SampleSource):
    """A `datasets.Dataset`, read row by row."""

    def __init__(
        self, dataset: Any, *, path: str, image_root: str | None, duplicates: Duplicates = "refuse"
    ) -> None:
        self.path = path
        self.image_root = image_root
        columns = [name for name in dataset.column_names if name in COLUMNS]
        if not {"messages", "conversations", "image", "images"} & set(columns):
            raise ConfigError(
                f"{path} has columns {', '.join(dataset.column_names)}; wanted `messages` or "
                f"`conversations`, and `image` or `images`; rename them with Dataset.rename_column"
            )
        self._dataset = _encoded_images(dataset.select_columns(columns))
        self._ids = unique_ids(Strings.of(self._read_ids()), path=path, duplicates=duplicates)

    def _read_ids(self) -> Iterator[str]:
        if "id" not in self._dataset.column_names:
            yield from map(str, range(len(self._dataset)))
            return
        narrow = self._dataset.select_columns(["id"])
        for start in range(0, len(narrow), 4096):
            for offset, value in enumerate(narrow[start : start + 4096]["id"]):
                yield entries.entry_id({"id": value}, start + offset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        sample_id = self._ids[index]
        where = f"{self.path}, row {index} (id {sample_id})"
        return entries.to_sample(self._dataset[index], sample_id=sample_id, where=where)

    def sample_ids(self) -> Sequence[str]:
        """Ids of all samples in order."""
        return self._ids

    def image_keys(self) -> NDArray[np.int64]:
        """[S] hash of each sample's first image reference, 0 without one; reads the images once."""
        return self._image_keys

    @cached_property
    def _image_keys(self) -> NDArray[np.int64]:
        refs = (entries.first_reference(self._dataset[index]) for index in range(len(self)))
        return np.fromiter(
            (0 if ref is None else entries.reference_key(ref) for ref in refs), np.int64, len(self)
        )


def _encoded_images(dataset: Any) -> Any:
    from datasets import Image, List

    for name in {"image", "images"} & set(dataset.column_names):
        feature = dataset.features[name]
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset
