"""From what a person types to a store: a directory, or a URL of an object store."""

from pathlib import Path

from common.cache.store import LocalStore, Store
from common.errors import ConfigError

Place = Store | Path | str
"""Where a cache is: its store, directory or URL."""


def as_store(place: Place) -> Store:
    """The store of a place."""
    if isinstance(place, str):
        return open_store(place)
    return LocalStore(place) if isinstance(place, Path) else place


def open_store(path: str, *, copied: bool = True) -> Store:
    """The store of a local path or of a URL: `s3://bucket/l1`, `gs://`, `az://`, `https://`, `hf://datasets/...`.

    Args:
        path: The path or URL.
        copied: Whether ranges of objects may come from the local copy; no for what proves a cache.

    Raises:
        ConfigError: A URL is given and the library for it is not installed.
    """
    if "://" not in path:
        return LocalStore(Path(path))
    if path.startswith("file://"):
        return LocalStore(Path(path.removeprefix("file://")))
    from common.cache.local_copy import default_copy

    copy = default_copy() if copied else None
    if path.startswith("hf://"):
        try:
            from common.cache.hub import HubStore
        except ImportError as error:
            raise ConfigError(
                f"{path} is on the Hugging Face Hub: install it with `pip install 'cascache[hub]'`"
            ) from error
        return HubStore(path, copy=copy)
    try:
        from common.cache.objects import ObjectStore
    except ImportError as error:
        raise ConfigError(
            f"{path} is in an object store: install it with `pip install 'cascache[store]'`"
        ) from error
    return ObjectStore(path, copy=copy)
