"""The door of data: recognises formats.

open_source("train.json")            LLaVA: id, image, conversations
open_source("chat.jsonl")            one {"messages": ...} per line
open_source("saved/")                a directory from datasets.save_to_disk
open_source("rows.parquet")          a Parquet file, or a directory of them
open_source("hf:owner/name:split")   a data set of the hub
open_source("shapes")                the built-in rendered set, made on first use
"""

from pathlib import Path

from common.data.hf_dataset import PARQUET, is_saved, open_hub, open_parquet, open_saved
from common.data.index import Duplicates
from common.data.llava_json import LlavaJson
from common.data.messages_jsonl import MessagesJsonl
from common.data.shapes import materialise
from common.data.source import NUMBER_SUFFIX, SampleSource
from common.errors import ConfigError

_KNOWN = (
    "a .json LLaVA file, a .jsonl file of chat messages, a .parquet file or a directory of them, a "
    "directory from datasets.save_to_disk, hf:owner/name[/configuration][:split] or shapes"
)


def open_source(path: str, *, image_root: str | None = None) -> SampleSource:
    """Open data of any known format.

    Args:
        path: A `.json` LLaVA file, a `.jsonl` file of chat messages, a `.parquet` file or a directory of
            them, a directory from `datasets.save_to_disk`, `hf:owner/name[/configuration][:split]`, or
            `shapes[:train=…,seed=…]`. `#number` at the end of a file name reads repeated ids as `id#2`,
            `id#3` instead of refusing them.
        image_root: Directory that relative image paths start from, kept as an absolute path. By default
            the data file's directory, or its `images` directory where the first image is found there only.

    Raises:
        ConfigError: No such file, or an unknown format.
        DataError: The file as a whole is broken, with the line or byte.
    """
    if image_root is not None:
        image_root = str(Path(image_root).expanduser().absolute())
    if path == "shapes" or path.startswith("shapes:"):
        return open_source(str(materialise(path)), image_root=image_root)
    if path.startswith("hf:"):
        return open_hub(path, image_root=image_root)
    name = path.removesuffix(NUMBER_SUFFIX)
    duplicates: Duplicates = "refuse" if name == path else "number"
    return _open_local(Path(name).expanduser(), image_root=image_root, duplicates=duplicates)


def recorded_path(path: str | None) -> str | None:
    """The recorded path of a cache's data, if opening it neither creates nor downloads anything.

    An untrusted cache may name data that would be rendered, downloaded or cached on first use; only
    an existing file or directory is used. None for everything else: `--data` has to name it.
    """
    if path is None or path == "shapes" or path.startswith(("shapes:", "hf:")) or "://" in path:
        return None
    return path if Path(path.removesuffix(NUMBER_SUFFIX)).exists() else None


def _open_local(path: Path, *, image_root: str | None, duplicates: Duplicates) -> SampleSource:
    if not path.exists():
        raise ConfigError(f"data {path} does not exist; wanted {_KNOWN}")
    if image_root is not None and not Path(image_root).is_dir():
        raise ConfigError(f"image root {image_root} is no directory; point it at the images")
    if path.suffix == PARQUET or (path.is_dir() and not is_saved(path) and any(path.rglob(f"*{PARQUET}"))):
        return open_parquet(path, image_root=image_root, duplicates=duplicates)
    if path.is_dir():
        return open_saved(path, image_root=image_root, duplicates=duplicates)
    if path.suffix == ".jsonl":
        return MessagesJsonl(path, image_root=image_root, duplicates=duplicates)
    if path.suffix == ".json":
        return LlavaJson(path, image_root=image_root, duplicates=duplicates)
    raise ConfigError(f"data {path} has suffix {path.suffix!r}; wanted {_KNOWN}")
