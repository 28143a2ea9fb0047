"""Where a cache's files are: a local directory, or an object store reached through `obstore`.

    read · open (ranges) · names · walk          what readers need
    create (only if absent) · add · remove       what writers need

Keys are relative, `/`-separated. Both stores promise that `create` lets one of several callers win, and
that a file is either whole or absent.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol


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

    def read(self, key: str) -> bytes:
        """A whole, small file.

        Raises:
            FileNotFoundError: There is none.
        """

    def open(self, key: str) -> Blob:
        """A file to read ranges of.

        Raises:
            FileNotFoundError: There is none.
        """

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


class LocalBlob:
    """An open file."""

    _fd = -1

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

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

    def read(self, key: str) -> bytes:
        """A whole, small file."""
        try:
            return (self.root / key).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(self.root / key)) from error

    def open(self, key: str) -> Blob:
        """A file to read ranges of."""
        return LocalBlob(self.root / key)

    def names(self, prefix: str) -> list[str]:
        """Names directly below a directory, sorted."""
        directory = self.root / prefix
        return sorted(entry.name for entry in os.scandir(directory)) if directory.is_dir() else []

    def walk(self, prefix: str = "") -> dict[str, int]:
        """Size of every file below a directory, by relative key."""
        base, sizes = self.root / prefix, {}
        for directory, _, names in os.walk(base):
            for name in names:
                path = Path(directory) / name
                sizes[path.relative_to(base).as_posix()] = path.lstat().st_size
        return sizes

    def create(self, key: str, data: bytes) -> bool:
        """Write a file whole and synced, unless it exists: a hard link is the decision."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.working() / f"new-{os.urandom(8).hex()}"
        write_synced(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        for parent in [*path.parents][: key.count("/") + 1]:
            sync_directory(parent)
        return True

    def add(self, source: Path, key: str) -> None:
        """Rename a finished, synced directory of this file system."""
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        sync_directory(target.parent)

    def remove(self, key: str) -> None:
        """Remove a file or directory, if it is there."""
        path = self.root / key
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def working(self) -> Path:
        """`.writing/` inside the cache: the same file system, so that rename works."""
        directory = self.root / ".writing"
        directory.mkdir(parents=True, exist_ok=True)
        return directory


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
