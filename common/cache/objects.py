"""Caches in object stores: S3, GCS, Azure, HTTP, through `obstore`; with a bounded local copy.

Objects appear whole or not at all; a conditional put decides which of several writers seals a part.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

from common.cache.local_copy import LocalCopy, ObjectBlob
from common.cache.store import COPY_BYTES, MAX_WHOLE_BYTES, Blob, scratch_directory
from common.errors import CacheError, ConfigError

UPLOAD_THREADS: Final = 16
"""Files of a part uploaded side by side."""

MULTIPART_BYTES: Final = 8 << 20
"""Bytes of a piece of a large upload."""


def _list_all(store: Any, prefix: str | None) -> list[Any]:
    return list(obstore.list(store, prefix))


class ObjectStore:
    """A prefix of a bucket. Credentials and endpoint come from the environment, as for `obstore`.

    Args:
        url: `s3://bucket/prefix`, `gs://...`, `az://...`, `https://...`.
        copy: Local copy of ranges; None for none.
        options: Passed on to `obstore.store.from_url`.
    """

    is_local = False

    def __init__(self, url: str, *, copy: LocalCopy | None = None, **options: Any) -> None:
        self.name = url
        try:
            self._store = obstore.store.from_url(url, **options)
        except BaseError as error:
            first = str(error).strip().splitlines()[0][:300]
            raise ConfigError(
                f"{url} names no object store: {first}; wanted s3://, gs://, az:// or https://"
            ) from error
        self._copy = copy
        self._working: Path | None = None

    def read(self, key: str, *, max_bytes: int = MAX_WHOLE_BYTES) -> bytes:
        """A whole, small object; never from the copy, because manifests and seals decide what exists."""
        try:
            found = self._ask(obstore.get, key)
            if found.meta["size"] > max_bytes:
                raise CacheError(
                    f"{self.name}/{key} has {found.meta['size']} bytes, more than {max_bytes}; refused: "
                    f"run `cascache verify`"
                )
            return bytes(found.bytes())
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{self.name}/{key}") from error

    def _ask(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Send a request; what only its sender can understand passes through.

        Raises:
            CacheError: The store cannot be reached, or refuses.
        """
        try:
            return request(self._store, *arguments, **options)
        except (NotFoundError, AlreadyExistsError):
            raise
        except BaseError as error:
            first = str(error).strip().splitlines()[0][:300]
            raise CacheError(
                f"{self.name}: {first}; check the bucket's name, and credentials and endpoint in the "
                f"environment (AWS_..., GOOGLE_..., AZURE_...)"
            ) from error

    def links(self) -> list[str]:
        """None: an object store has no links."""
        return []

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """A range of an object that never changes: sealed files do not."""
        name = f"{self.name}\n{key}\n{offset}\n{length}"
        data = self._copy.get(name) if self._copy else None
        if data is None:
            data = bytes(self._ask(obstore.get_range, key, start=offset, length=length))
            if self._copy:
                self._copy.put(name, data)
        return data

    def open(self, key: str) -> Blob:
        """An object to read ranges of."""
        try:
            return ObjectBlob(self, key, int(self._ask(obstore.head, key)["size"]))
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{self.name}/{key}") from error

    def pieces(self, key: str) -> Iterator[bytes]:
        """An object from its start to its end, in one request; never from the copy."""
        try:
            found = self._ask(obstore.get, key)
            if found.meta["size"] <= COPY_BYTES:
                yield bytes(found.bytes())
            else:
                yield from map(bytes, found.stream(min_chunk_size=COPY_BYTES))
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{self.name}/{key}") from error

    def put(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """Put an object whole: bytes in one request, pieces in several."""
        if isinstance(data, bytes):
            self._ask(obstore.put, key, data, use_multipart=False)
        else:
            self._ask(obstore.put, key, data, chunk_size=MULTIPART_BYTES, max_concurrency=4)

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted."""
        found = self._ask(obstore.list_with_delimiter, prefix or None)
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in paths})

    def walk(self, prefix: str = "") -> dict[str, int]:
        """Size of every object below a prefix, by relative key."""
        sizes = {}
        for page in self._ask(_list_all, prefix or None):
            for item in page:
                path = str(item["path"])
                sizes[path.removeprefix(f"{prefix}/") if prefix else path] = int(item["size"])
        return sizes

    def create(self, key: str, data: bytes) -> bool:
        """Put an object unless it exists: a conditional put is the decision."""
        try:
            self._ask(obstore.put, key, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def add(self, source: Path, key: str) -> None:
        """Upload a finished local directory; nothing names it yet, so order does not matter."""
        paths = [p for p in source.rglob("*") if p.is_file()]
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            keys = [f"{key}/{path.relative_to(source).as_posix()}" for path in paths]
            list(pool.map(lambda pair: self._ask(obstore.put, *pair), zip(keys, paths, strict=True)))

    def remove(self, key: str) -> None:
        """Remove an object, and all below it."""
        doomed = [f"{key}/{name}" for name in self.walk(key)]
        with suppress(NotFoundError, FileNotFoundError):
            self._ask(obstore.delete, key)
        if doomed:
            self._ask(obstore.delete, doomed)

    def working(self) -> Path:
        """A directory on the local disk."""
        if self._working is None:
            self._working = scratch_directory()
        return self._working

    def tidy(self) -> None:
        """Remove the local directory, if it is empty."""
        if self._working is not None:
            with suppress(OSError):
                self._working.rmdir()
                self._working = None
