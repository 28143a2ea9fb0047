"""Where a cache's files are: a local directory, or an object store reached through `obstore`.

    read · open (ranges) · names · walk          what readers need
    create (only if absent) · add · remove       what writers need

Keys are relative, `/`-separated. Both stores promise that `create` lets one of several callers win, and
that a file is either whole or absent. A cache holds no symbolic links: what one points to is never read,
written or removed.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, Protocol

from common.cache.leases import is_left, lease
from common.errors import CacheError

MAX_WHOLE_BYTES: Final = 64 << 20
"""No manifest, seal or metadata document is larger: what an untrusted cache can make a reader hold."""

_PIECE_BYTES: Final = 1 << 30

COPY_BYTES: Final = 4 << 20
"""Bytes of a piece when a file is copied."""


class Blob(Protocol):
    """One open file or object."""

    size: int
    """Bytes in it."""

    def read(self, offset: int, length: int) -> bytes:
        """A range; shorter only at the end."""

    def close(self) -> None:
        """Let go of it."""


class Store(Protocol):
    """The files of one cache."""

    name: str
    """For messages: the path or URL."""
    is_local: bool
    """Whether it is a directory, which may be empty."""

    def read(self, key: str, *, max_bytes: int = MAX_WHOLE_BYTES) -> bytes:
        """A whole, small file.

        Raises:
            FileNotFoundError: There is none.
            CacheError: It is larger than `max_bytes`, or not a file.
        """

    def open(self, key: str) -> Blob:
        """A file to read ranges of.

        Raises:
            FileNotFoundError: There is none.
            CacheError: It is not a file.
        """

    def pieces(self, key: str) -> Iterator[bytes]:
        """A file from its start to its end, to be copied.

        Raises:
            FileNotFoundError: There is none.
        """

    def put(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """Write a file whole, in place of one that may be there."""

    def links(self) -> list[str]:
        """Symbolic links anywhere in the cache, which holds none."""

    def names(self, prefix: str) -> list[str]:
        """Names directly below a directory, sorted; empty when there is none."""

    def walk(self, prefix: str = "") -> dict[str, int]:
        """Size of every file below a directory, by key relative to it."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a file whole, unless it exists; returns whether this call did."""

    def add(self, source: Path, key: str) -> None:
        """Move a finished, synced local directory to a new key."""

    def remove(self, key: str) -> None:
        """Remove a file or directory, if it is there."""

    def working(self) -> Path:
        """A local directory to prepare parts in."""

    def tidy(self) -> None:
        """Remove what dead processes left in the working directory, and the directory too if it is unused."""


_MKDIR_ATTEMPTS: Final = 50


class LocalBlob:
    """An open file."""

    _fd = -1

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"{path} is not a regular file; a cache holds nothing else: remove it")
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        """A range; shorter only at the end."""
        return os.pread(self._fd, length, offset)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class LocalStore:
    """A directory on a POSIX file system."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def _path(self, key: str) -> Path:
        """Path of a key whose parents are real directories.

        Raises:
            CacheError: A directory above it is a symbolic link.
        """
        path = self.root / key
        for parent in [*path.parents][: key.count("/")]:
            if parent.is_symlink():
                raise CacheError(_link_text(parent))
        return path

    def _real_path(self, key: str) -> Path:
        """As `_path`, and the path itself is no symbolic link either."""
        path = self._path(key)
        if key and path.is_symlink():
            raise CacheError(_link_text(path))
        return path

    def read(self, key: str, *, max_bytes: int = MAX_WHOLE_BYTES) -> bytes:
        """A whole, small file."""
        with closing(self.open(key)) as blob:
            if blob.size > max_bytes:
                raise CacheError(
                    f"{self.root / key} has {blob.size} bytes, more than {max_bytes}; refused: "
                    f"run `cascache verify`"
                )
            pieces = range(0, blob.size, _PIECE_BYTES)
            return b"".join([blob.read(at, min(_PIECE_BYTES, blob.size - at)) for at in pieces])

    def open(self, key: str) -> Blob:
        """A file to read ranges of."""
        try:
            return LocalBlob(self._real_path(key))
        except NotADirectoryError as error:
            raise FileNotFoundError(str(self.root / key)) from error
        except PermissionError as error:
            raise CacheError(f"{self.root / key} may not be read ({error}); fix its permissions") from error

    def pieces(self, key: str) -> Iterator[bytes]:
        """A file from its start to its end."""
        with closing(self.open(key)) as blob:
            for at in range(0, blob.size, COPY_BYTES):
                yield blob.read(at, COPY_BYTES)

    def put(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """Write a file under a temporary name, synced, and rename it."""
        path = self._path(key)
        _make(path.parent)
        self._write_new(data if isinstance(data, bytes) else b"".join(data)).replace(path)
        sync_directory(path.parent)

    def links(self) -> list[str]:
        """Symbolic links anywhere below the root."""
        return sorted(
            (Path(directory) / name).relative_to(self.root).as_posix()
            for directory, directories, files in os.walk(self.root)
            for name in (*directories, *files)
            if (Path(directory) / name).is_symlink()
        )

    def names(self, prefix: str) -> list[str]:
        """Names directly below a directory, sorted."""
        directory = self._real_path(prefix)
        return sorted(entry.name for entry in os.scandir(directory)) if directory.is_dir() else []

    def walk(self, prefix: str = "") -> dict[str, int]:
        """Size of every file below a directory, by relative key."""
        base, sizes = self._real_path(prefix), {}
        for directory, _, names in os.walk(base):
            for name in names:
                path = Path(directory) / name
                sizes[path.relative_to(base).as_posix()] = path.lstat().st_size
        return sizes

    def create(self, key: str, data: bytes) -> bool:
        """Write a file whole and synced, unless it exists: a hard link is the decision."""
        path = self._path(key)
        _make(path.parent)
        temporary = self._write_new(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        for parent in [*path.parents][: key.count("/") + 1]:
            sync_directory(parent)
        return True

    def _write_new(self, data: bytes) -> Path:
        """A new, synced file; again, when another process tidied the directory away meanwhile."""
        while True:
            path = self.working() / f"new-{os.urandom(8).hex()}{lease()}"
            with suppress(FileNotFoundError):
                write_synced(path, data)
                return path

    def add(self, source: Path, key: str) -> None:
        """Rename a finished, synced directory of this file system."""
        target = self._path(key)
        _make(target.parent)
        source.rename(target)
        sync_directory(target.parent)

    def remove(self, key: str) -> None:
        """Remove a file or directory, if it is there; of a symbolic link, the link."""
        path = self._path(key)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def working(self) -> Path:
        """`.writing/` inside the cache: the same file system, so that rename works."""
        directory = self._real_path(".writing")
        _make(directory)
        return directory

    def tidy(self) -> None:
        """Remove what dead processes left in `.writing/`, and it too if it is empty: Zarr warns about it."""
        with suppress(OSError):
            directory = self._real_path(".writing")
            for path in directory.iterdir():
                if is_left(path):
                    self.remove(f".writing/{path.name}")
            directory.rmdir()


def _make(directory: Path) -> None:
    """As `mkdir -p`, also while another process removes the directory because it is empty.

    Python finds that it exists, looks whether it is a directory, and takes one that has just gone for a file.
    """
    for attempt in range(_MKDIR_ATTEMPTS):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return
        except (FileExistsError, FileNotFoundError):
            if attempt + 1 == _MKDIR_ATTEMPTS:
                raise


def make_working(store: Store, name: str) -> Path:
    """A new directory to prepare something in; again, when another process tidied its parent away."""
    while True:
        directory = store.working() / f"{name}{lease()}"
        with suppress(FileNotFoundError):
            directory.mkdir()
            return directory


def _link_text(path: Path) -> str:
    return f"{path} is a symbolic link; a cache holds none: put what it points to in its place, or remove it"


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def scratch_directory() -> Path:
    """A new directory on the local disk for what goes to an object store."""
    return Path(tempfile.mkdtemp(prefix="cascache-"))
