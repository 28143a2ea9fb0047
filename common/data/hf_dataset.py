"""Hugging Face data sets (saved on disk, in Parquet or on the hub) with `messages` or `conversations`.

Columns: `messages` or `conversations`; `image` or `images`, or images inside the messages; optionally
`id`, `kind`, `question_type`. Rows are read as Arrow holds them: no image, sound or video is decoded
here, whatever column it is nested in, so that hashes are of the files themselves.
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
from common.errors import ConfigError, shorten
from schemas.sample import Sample

COLUMNS = ("id", "messages", "conversations", "image", "images", "kind", "question_type")
PARQUET = ".parquet"
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


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
        split = _only_split(loaded, path, f"name one: {path}/{next(iter(loaded))}")
        loaded, path = loaded[split], path / split
    name = str(path.absolute()) + (NUMBER_SUFFIX if duplicates == "number" else "")
    return HfDataset(loaded, path=name, image_root=image_root or str(path.absolute()), duplicates=duplicates)


def is_saved(path: Path) -> bool:
    """Whether a directory was written by `datasets.save_to_disk`."""
    return any((path / name).exists() for name in _SAVED)


def open_parquet(path: Path, *, image_root: str | None, duplicates: Duplicates = "refuse") -> "HfDataset":
    """Open a Parquet file, or a directory of them; of several splits (`train-*`, `test-*`), `train`.

    `datasets` converts them once into its own cache (`HF_DATASETS_CACHE`), which takes as much disk again.

    Raises:
        ConfigError: They cannot be read, hold several splits none of which is `train`, or lack the columns.
    """
    datasets = _library()
    files: dict[str, Any] = {"data_dir": str(path)} if path.is_dir() else {"data_files": [str(path)]}
    try:
        loaded = datasets.load_dataset("parquet", **files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {_brief(error)}; name other files") from error
    split = _only_split(loaded, path, "name the files of one")
    name = str(path.absolute()) + (NUMBER_SUFFIX if duplicates == "number" else "")
    root = path if path.is_dir() else path.parent
    return HfDataset(
        loaded[split], path=name, image_root=image_root or str(root.absolute()), duplicates=duplicates
    )


def _only_split(loaded: Any, path: Path, cure: str) -> str:
    names = list(loaded)
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else str(names[0])
    raise ConfigError(f"{path} holds splits {', '.join(names)}; {cure}")


def _brief(error: BaseException) -> str:
    """A library's error with its cause: its own message often names only the step."""
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return shorten(f"{error}{cause}")


def open_hub(path: str, *, image_root: str | None) -> "HfDataset":
    """Open `hf:owner/name[/configuration][:split][#number]` from the hub, or its local copy when offline.

    Raises:
        ConfigError: The name is malformed, there is no such data set or split, or it lacks the columns.
    """
    name = path.removesuffix(NUMBER_SUFFIX)
    repository, _, split = name.removeprefix("hf:").partition(":")
    owner, _, rest = repository.partition("/")
    title, slash, configuration = rest.partition("/")
    if not (owner and title) or "/" in configuration or bool(slash) != bool(configuration):
        raise ConfigError(
            f"{path!r} names no data set; wanted hf:owner/name, hf:owner/name:split or "
            "hf:owner/name/configuration:split"
        )
    datasets = _library()
    try:
        loaded = datasets.load_dataset(f"{owner}/{title}", configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"cannot load {path}: {_brief(error)}; check name, split, "
            "configuration (hf:owner/name/configuration), network and HF_TOKEN"
        ) from error
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
        columns = [name for name in dataset.column_names if name in COLUMNS or name in entries.OTHER_INPUTS]
        if not {"messages", "conversations", "image", "images"} & set(columns):
            raise ConfigError(
                f"{path} has columns {', '.join(dataset.column_names)}; wanted `messages` or "
                f"`conversations`, and `image` or `images`; rename them with Dataset.rename_column"
            )
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._ids = unique_ids(Strings.of(self._read_ids()), path=path, duplicates=duplicates)

    def _read_ids(self) -> Iterator[str]:
        if "id" not in self._dataset.column_names:
            yield from map(str, range(len(self._dataset)))
            return
        narrow = self._dataset.select_columns(["id"])
        for start in range(0, len(narrow), 4096):
            for offset, value in enumerate(narrow[start : start + 4096]["id"].to_pylist()):
                yield entries.entry_id({"id": value}, start + offset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        sample_id = self._ids[index]
        where = f"{self.path}, row {index} (id {sample_id})"
        return entries.to_sample(self._row(index), sample_id=sample_id, where=where)

    def _row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._dataset[index].to_pylist()[0]
        return row

    def sample_ids(self) -> Sequence[str]:
        """Ids of all samples in order."""
        return self._ids

    def image_keys(self) -> NDArray[np.int64]:
        """[S] hash of each sample's first image reference, 0 without one; reads the images once."""
        return self._image_keys

    @cached_property
    def _image_keys(self) -> NDArray[np.int64]:
        refs = (entries.first_reference(self._row(index)) for index in range(len(self)))
        return np.fromiter(
            (0 if ref is None else entries.reference_key(ref) for ref in refs), np.int64, len(self)
        )
