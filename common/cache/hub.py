"""Caches in dataset repositories of the Hugging Face Hub: `hf://datasets/owner/name[@revision]/prefix`.

    put, put, ... ── staged on the local disk ── create(seal) ──> one commit: the part's files and its seal

A commit is atomic, and refused when the branch moved meanwhile: then what exists is looked at again. Every
commit costs the Hub about a second, so a part is one.
"""

import importlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from common.cache.local_copy import LocalCopy, ObjectBlob
from common.cache.store import MAX_WHOLE_BYTES, Blob, scratch_directory
from common.errors import CacheError, ConfigError

T = TypeVar("T")

RANGE_BYTES: Final = 32 << 20
"""Bytes of one request when a file is copied."""

_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?")
_MOVED: Final = (409, 412)
_ATTEMPTS: Final = 8


def _transport_error() -> type[Exception]:
    """What the Hub's HTTP library raises when the server does not answer: httpx, or its successor."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = library.HTTPError
    return found


class HubStore:
    """A prefix of a dataset repository, which has to exist. Credentials are those of `huggingface-cli login`.

    Args:
        url: `hf://datasets/owner/name[@revision]/prefix`.
        copy: Local copy of ranges; None for none.

    Raises:
        ConfigError: It is another kind of URL.
    """

    is_local = False

    def __init__(self, url: str, *, copy: LocalCopy | None = None) -> None:
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(f"{url} is not understood; give hf://datasets/owner/name/prefix")
        self.name = url
        self._repo, revision, self._prefix = match.group(1), match.group(2) or "main", match.group(3) or ""
        self._where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
        self._endpoint = os.environ.get("HF_ENDPOINT")
        self._api = HfApi(endpoint=self._endpoint)
        self._unreachable = _transport_error()
        self._copy = copy
        self._staged: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._working: Path | None = None

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self._prefix, key) if part)

    def _ask(self, work: Callable[[], T], what: str) -> T:
        try:
            return work()
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{self.name}/{what}") from error
        except (HfHubHTTPError, OSError, self._unreachable) as error:
            raise CacheError(
                f"{self.name}: the Hub refuses {what or 'the listing'} ({str(error)[:300]}); check that the "
                f"repository exists and that you are logged in (huggingface-cli login)"
            ) from error

    def _get(self, key: str, offset: int, length: int) -> bytes:
        url = hf_hub_url(self._repo, self._path(key), endpoint=self._endpoint, **self._where)
        headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + length - 1}"}

        def ask() -> bytes:
            answer = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            whole = bytes(answer.content)
            return whole[offset : offset + length] if answer.status_code == 200 else whole

        return self._ask(ask, key)

    def _size(self, key: str) -> int:
        asked = self._path(key)
        found = self._ask(
            lambda: self._api.get_paths_info(self._repo, [asked], **self._where), key or "the listing"
        )
        sizes = [entry.size for entry in found if isinstance(entry, RepoFile) and entry.path == asked]
        if not sizes:
            raise FileNotFoundError(f"{self.name}/{key}")
        return int(sizes[0])

    def _list(self, prefix: str, *, recursive: bool) -> list[Any]:
        try:
            return self._ask(
                lambda: list(
                    self._api.list_repo_tree(
                        self._repo, self._path(prefix) or None, recursive=recursive, **self._where
                    )
                ),
                prefix,
            )
        except FileNotFoundError:
            return []

    def read(self, key: str, *, max_bytes: int = MAX_WHOLE_BYTES) -> bytes:
        """A whole, small file; never from the copy."""
        size = self._size(key)
        if size > max_bytes:
            raise CacheError(f"{self.name}/{key} has {size} bytes, more than {max_bytes}; refused")
        return self._get(key, 0, size) if size else b""

    def links(self) -> list[str]:
        """None: a reader here gets a link's text, not what it points to."""
        return []

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """A range of a file that never changes: sealed files do not."""
        name = f"{self.name}\n{key}\n{offset}\n{length}"
        data = self._copy.get(name) if self._copy else None
        if data is None:
            data = self._get(key, offset, length)
            if self._copy:
                self._copy.put(name, data)
        return data

    def open(self, key: str) -> Blob:
        """A file to read ranges of."""
        return ObjectBlob(self, key, self._size(key))

    def pieces(self, key: str) -> Iterator[bytes]:
        """A file from its start to its end; never from the copy."""
        size = self._size(key)
        for at in range(0, size, RANGE_BYTES):
            yield self._get(key, at, min(RANGE_BYTES, size - at))

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted."""
        return sorted(str(entry.path).rsplit("/", 1)[-1] for entry in self._list(prefix, recursive=False))

    def walk(self, prefix: str = "") -> dict[str, int]:
        """Size of every file below a prefix, by relative key."""
        base = self._path(prefix)
        entries = [entry for entry in self._list(prefix, recursive=True) if isinstance(entry, RepoFile)]
        return {str(e.path).removeprefix(f"{base}/" if base else ""): int(e.size) for e in entries}

    def put(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """Stage a file; the next `create` commits it."""
        path = self.working() / f"staged-{os.urandom(8).hex()}"
        with path.open("xb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
        with self._lock:
            self._staged[key] = path

    def add(self, source: Path, key: str) -> None:
        """Stage a finished local directory."""
        for path in [p for p in source.rglob("*") if p.is_file()]:
            self.put(f"{key}/{path.relative_to(source).as_posix()}", path.read_bytes())

    def create(self, key: str, data: bytes) -> bool:
        """Commit a file and all that was staged before it, unless the file exists."""
        with self._lock:
            staged = dict(self._staged)
        for _ in range(_ATTEMPTS):
            head = self._ask(lambda: self._api.repo_info(self._repo, **self._where), "repository").sha
            if self._exists(key):
                return False
            files = [CommitOperationAdd(self._path(name), str(path)) for name, path in staged.items()]
            files.append(CommitOperationAdd(self._path(key), data))
            if self._commit(files, f"Add {key}", parent=head):
                with self._lock:
                    for name, path in staged.items():
                        self._staged.pop(name, None)
                        path.unlink(missing_ok=True)
                return True
        raise CacheError(f"{self.name}: the branch moves all the time; run the same command again")

    def _exists(self, key: str) -> bool:
        try:
            return self._size(key) >= 0
        except FileNotFoundError:
            return False

    def _commit(self, operations: list[Any], message: str, *, parent: str | None) -> bool:
        """One commit; False when the branch moved meanwhile."""
        try:
            self._api.create_commit(
                self._repo, operations, commit_message=message, parent_commit=parent, **self._where
            )
        except HfHubHTTPError as error:
            if getattr(error.response, "status_code", None) in _MOVED:
                return False
            raise CacheError(f"{self.name}: the Hub refuses the commit ({str(error)[:300]})") from error
        except self._unreachable as error:
            raise CacheError(f"{self.name}: the Hub does not answer ({error}); run it again") from error
        return True

    def remove(self, key: str) -> None:
        """Remove a file, or all below it."""
        doomed = [f"{key}/{name}" for name in self.walk(key)] or ([key] if self._exists(key) else [])
        if doomed:
            operations = [CommitOperationDelete(self._path(name)) for name in doomed]
            self._commit(operations, f"Remove {key}", parent=None)

    def working(self) -> Path:
        """A directory on the local disk."""
        if self._working is None:
            self._working = scratch_directory()
        return self._working

    def tidy(self) -> None:
        """Remove the local directory, unless a file in it waits for its commit."""
        if self._working is not None and not self._staged:
            with suppress(OSError):
                shutil.rmtree(self._working)
            self._working = None
