"""From what a person types to a store: a directory, or a URL of an object store."""

import os
from pathlib import Path

from common.cache.store import LocalStore, Store
from common.errors import ConfigError
from common.home import expand_home

Place = Store | Path | str
"""Where a cache is: its store, directory or URL."""


def as_store(place: Place) -> Store:
    """The store of a place."""
    if isinstance(place, str):
        return open_store(place)
    return LocalStore(place) if isinstance(place, Path) else place


def _check_url(url: str) -> None:
    """Refuse URLs that the libraries would read differently: a query, a fragment, empty segments."""
    scheme, _, rest = url.partition("://")
    if found := sorted({"?", "#"} & set(rest)):
        raise ConfigError(
            f"{redact(url)} holds {' and '.join(found)}, which would be cut off as a query or fragment; "
            "choose a name without it"
        )
    if "//" in rest or any(part in (".", "..") for part in rest.split("/")):
        raise ConfigError(
            f"{redact(url)} has an empty, . or .. segment, which no object store keeps; take it out"
        )
    if scheme == "s3":
        _check_endpoint()


def _check_endpoint() -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(name)
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"{name} is {endpoint!r}; wanted an address with its scheme, as https://{endpoint}"
            )
        allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on", "y", "t")
        if endpoint and endpoint.startswith("http://") and not allowed:
            raise ConfigError(
                f"{name} is {endpoint}, without encryption; set AWS_ALLOW_HTTP=true to allow that, or use https://"
            )


def redact(url: str) -> str:
    """A URL without the password that it may hold."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def open_store(path: str, *, copied: bool = True) -> Store:
    """The store of a local path or of a URL: `s3://bucket/l1`, `gs://`, `az://`, `https://`, `hf://datasets/...`.

    Args:
        path: The path or URL.
        copied: Whether ranges of objects may come from the local copy; no for what proves a cache.

    Raises:
        ConfigError: A URL is given and the library for it is not installed, or the URL or the environment
            would be read as another place.
    """
    if "://" not in path:
        return LocalStore(Path(expand_home(path)))
    if path.startswith("file://"):
        return LocalStore(Path(path.removeprefix("file://")))
    _check_url(path)
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
