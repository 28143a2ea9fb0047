"""A bounded local copy of what was fetched from far away, shared by processes and jobs.

    block read ──> local copy? ── yes ──> read it ──> checksum fits ──> done
                       │ no, or damaged
                       └──> ranged get ──> store (temporary name, rename) ──> trim to the bound

The copy is a directory of files named by a hash of (URL, key, range). Files appear whole or not at all, and
what is read from them is checked like the original.
"""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from common.errors import ConfigError
from common.units import parse_bytes

log = logging.getLogger(__name__)

COPY_VARIABLE: Final = "CASCACHE_COPY"
"""Environment variable: directory of the local copy; empty turns it off."""

COPY_BYTES_VARIABLE: Final = "CASCACHE_COPY_BYTES"
"""Environment variable: bytes the local copy may take, with or without a unit (20GB)."""

DEFAULT_COPY_BYTES: Final = 20 << 30

_TRIM_TO: Final = 0.8
_TRIM_SHARE: Final = 0.05
"""Share of the bound that a process writes before it looks at the directory again."""


class LocalCopy:
    """A bounded directory of ranges already fetched, shared by any number of processes.

    Args:
        directory: Where; made when needed.
        max_bytes: Bytes kept; each process that writes may overshoot by a twentieth of it, and one range.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._untrimmed_bytes: float = max_bytes  # look at what others left first
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.directory / digest[:2] / digest[2:]

    def get(self, name: str) -> bytes | None:
        """Bytes kept under a name, if they are whole: length and hash stand before them."""
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        with suppress(OSError):
            os.utime(self._path(name))
        return data[32:]

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes; a full or broken disk is no reason to stop reading."""
        path = self._path(name)
        if len(data) > self.max_bytes * _TRIM_TO:
            return
        temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
            temporary.rename(path)
        except OSError as error:
            log.warning("%s cannot keep a copy (%s)", self.directory, error)
            temporary.unlink(missing_ok=True)
        self._untrimmed_bytes += len(data)
        if self._untrimmed_bytes > self.max_bytes * _TRIM_SHARE:
            self._untrimmed_bytes = 0
            self.trim()

    def trim(self) -> None:
        """Remove what was not read for longest, once the bound is passed."""
        entries = []
        for path in self.directory.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            with suppress(OSError):
                path.unlink()
                total -= size
            if total <= self.max_bytes * _TRIM_TO:
                return


def default_copy() -> LocalCopy | None:
    """The local copy that the environment asks for; by default below the user's cache directory.

    None where it is turned off or the default one cannot be created, since it is optional.

    Raises:
        ConfigError: The environment names a directory that cannot be made, or bytes that are no size.
    """
    given = os.environ.get(COPY_VARIABLE)
    max_bytes = parse_bytes(
        os.environ.get(COPY_BYTES_VARIABLE, str(DEFAULT_COPY_BYTES)), name=COPY_BYTES_VARIABLE
    )
    if given == "" or max_bytes <= 0:
        return None
    try:
        return LocalCopy(Path(given) if given else _default_directory(), max_bytes)
    except (OSError, RuntimeError) as error:
        if given:
            raise ConfigError(
                f"{COPY_VARIABLE} is {given!r}, which cannot be used ({error}); name a directory that can be "
                "written, or set it empty for no local copy"
            ) from error
        log.warning("no local copy of what is fetched: %s; %s can name a place", error, COPY_VARIABLE)
        return None


def _default_directory() -> Path:
    """Below the user's cache directory; a user without a home raises RuntimeError."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cascache" / "objects"


class Ranged(Protocol):
    """A store whose objects are read by ranges."""

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """A range of an object that never changes."""


class ObjectBlob:
    """One object, read by ranges."""

    def __init__(self, store: Ranged, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """A range; shorter only at the end."""
        length = min(length, self.size - offset)
        return self._store.read_range(self._key, offset, length) if length > 0 else b""

    def close(self) -> None:
        """Nothing is held."""
