"""Where the files of a part gather until it is sealed; what an earlier attempt left there is used again.

    directory    .writing/00012-9f31c2/name      temporary name, synced, renamed; whole directory at the end
    bucket       parts/00012-9f31c2/name         objects appear whole, and nothing names them yet

What lies there already counts only after every byte was hashed.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final, Protocol

from common.cache import layout
from common.cache.store import LocalStore, Store, sync_directory
from common.errors import CacheError, PartCorrupt
from schemas.manifest import FileSeal, PartSeal

ONE_PUT_BYTES: Final = 16 << 20
"""Files up to this size go to a bucket in one request, larger ones in pieces."""


def proven(pieces: Iterable[bytes], wanted: FileSeal, where: str) -> Iterator[bytes]:
    """Hand pieces of a file on; the last one only when size and hash are those sealed.

    Raises:
        PartCorrupt: They are not, or the file is missing.
    """
    digest, size, last = hashlib.sha256(), 0, b""
    try:
        for piece in pieces:
            size += len(piece)
            if size > wanted.size_bytes:
                break
            digest.update(piece)
            if last:
                yield last
            last = piece
    except FileNotFoundError as error:
        raise PartCorrupt(f"{where} is missing; run `cascache verify`") from error
    if size != wanted.size_bytes or digest.hexdigest() != wanted.sha256:
        raise PartCorrupt(f"{where} is not what was sealed; run `cascache verify`")
    yield last


class Landing(Protocol):
    """The files of one part on their way to a seal."""

    def holds(self, name: str, wanted: FileSeal) -> bool:
        """Whether an earlier attempt left this very file."""

    def write(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Take a file; it is there whole or not at all."""

    def finish(self) -> None:
        """Make all files final; a seal may follow."""


def land(store: Store, seal: PartSeal) -> Landing:
    """The landing of a part in a store."""
    return LocalLanding(store, seal) if isinstance(store, LocalStore) else ObjectLanding(store, seal)


class LocalLanding:
    """A directory below `.writing/`, or in `parts/` when an earlier attempt came as far as that."""

    def __init__(self, store: LocalStore, seal: PartSeal) -> None:
        self._store, self._seal = store, seal
        self._key = f"{layout.PARTS}/{seal.directory}"
        self._is_final = seal.directory in store.names(layout.PARTS)
        self._directory = store.root / self._key if self._is_final else store.working() / seal.directory
        if self._directory.is_symlink():
            raise CacheError(f"{self._directory} is a symbolic link; a cache holds none: remove it")
        for name in {"", *(name.rpartition("/")[0] for name in seal.files)}:
            (self._directory / name).mkdir(parents=True, exist_ok=True)

    def holds(self, name: str, wanted: FileSeal) -> bool:
        """Whether the file is there, proven."""
        path = self._directory / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != wanted.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256

    def write(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Write, sync, rename."""
        path = self._directory / name
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove what killed attempts left, sync, and move the directory into place."""
        for path in [p for p in self._directory.rglob("*") if not p.is_dir()]:
            if path.relative_to(self._directory).as_posix() not in self._seal.files:
                path.unlink(missing_ok=True)
        for directory in {self._directory, *(path.parent for path in self._directory.glob("*/*"))}:
            sync_directory(directory)
        if not self._is_final:
            try:
                self._store.add(self._directory, self._key)
            except OSError as error:
                where = f"{self._directory} cannot be moved to {self._key} ({error})"
                raise CacheError(
                    f"{where}; does another copy into this cache run? Run this one again"
                ) from error


class ObjectLanding:
    """Objects below the part's final key."""

    def __init__(self, store: Store, seal: PartSeal) -> None:
        self._store = store
        self._key = f"{layout.PARTS}/{seal.directory}"
        self._sizes = store.walk(self._key)

    def holds(self, name: str, wanted: FileSeal) -> bool:
        """Whether the object is there: read again and proven."""
        if self._sizes.get(name) != wanted.size_bytes:
            return False
        key = f"{self._key}/{name}"
        with suppress(PartCorrupt):
            for _ in proven(self._store.pieces(key), wanted, key):
                pass
            return True
        return False

    def write(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Put an object."""
        key = f"{self._key}/{name}"
        self._store.put(key, b"".join(pieces) if size <= ONE_PUT_BYTES else pieces)

    def finish(self) -> None:
        """Objects are final as they are."""
