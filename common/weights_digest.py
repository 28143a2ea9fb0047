"""SHA-256 over a model's weight files, computed once for each state of the files.

    digest    one running SHA-256 over (name, size, bytes) of every file, in name order
    state     path, size, time stamps and inode of every file
    memory    ~/.cache/cascache/weights.json: state -> digest

145 GB take minutes to hash, and one running digest cannot be split over threads; it is what existing caches
carry, so it stays, threads read ahead of it, and the result is remembered. A file that was written, replaced
or touched has another state and is hashed again: its status-change time differs even when size and
modification time were set back. A change that no time stamp records (below the file system) is not
noticed; remove the memory to have everything hashed again.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tqdm import tqdm

from common.errors import ConfigError

_CHUNK_BYTES: Final = 8 << 20
_AHEAD: Final = 8
"""Chunks that are read before they are hashed."""
_READERS: Final = 4

WORTH_BYTES: Final = 256 << 20
"""Weights below this are hashed every time: a second or less."""

SETTLED_SECONDS: Final = 2.0
"""Files written this shortly ago are not remembered: another write could leave the same time stamps."""

_MOST_ENTRIES: Final = 256
_PATIENCE_SECONDS: Final = 3.0
"""Before a progress bar appears."""


def weights_sha256(directory: Path) -> str:
    """Hash a model directory's weight files, in name order, or return the remembered digest.

    Args:
        directory: A local model directory, or the snapshot directory of a hub model.

    Raises:
        ConfigError: The directory holds no weight file.
    """
    files = weight_files(directory)
    if not files:
        raise ConfigError(f"{directory} holds no *.safetensors or *.bin weights; is it a model directory?")
    memory = _memory_file() if sum(each.stat().st_size for each in files) >= WORTH_BYTES else None
    before = files_state(files)
    known = _recall(memory).get(before) if memory is not None else None
    if known is not None:
        return known
    digest = hash_weights(files)
    if memory is not None and files_state(files) == before and _settled(files):
        _remember(memory, before, digest)
    return digest


def weight_files(directory: Path) -> list[Path]:
    """A model directory's weight files, in name order."""
    return sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])


def hash_weights(files: Sequence[Path]) -> str:
    """One SHA-256 over name, size and bytes of each file."""
    digest = hashlib.sha256()
    total = sum(each.stat().st_size for each in files)
    every = 0.5 if sys.stderr.isatty() else 15.0
    with (
        ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights") as pool,
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="hash weights",
            delay=_PATIENCE_SECONDS,
            mininterval=every,
            leave=False,
        ) as bar,
    ):
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for chunk in _read_ahead(file, pool):
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _read_ahead(file: Path, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """A file's bytes in order, several chunks under way at a time."""
    with file.open("rb") as stream:
        number = stream.fileno()
        offsets = iter(range(0, os.fstat(number).st_size, _CHUNK_BYTES))
        pending: deque[Future[bytes]] = deque()
        try:
            for offset in offsets:
                pending.append(pool.submit(_read_at, number, offset))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # the file stays open until all reads are done
                with contextlib.suppress(OSError):
                    future.result()


def _read_at(number: int, offset: int) -> bytes:
    """A whole chunk; one read may give less than it was asked for."""
    pieces = []
    wanted = _CHUNK_BYTES
    while wanted and (piece := os.pread(number, wanted, offset)):
        pieces.append(piece)
        offset += len(piece)
        wanted -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def files_state(files: Sequence[Path]) -> str:
    """What changes whenever one of the files does, as a hash."""
    found = [(each.name, os.path.realpath(each), each.stat()) for each in files]
    state = [
        [name, place, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for name, place, stat in found
    ]
    return hashlib.sha256(json.dumps(state).encode("utf-8", "surrogatepass")).hexdigest()


def _settled(files: Sequence[Path]) -> bool:
    newest = max(max(stat.st_mtime, stat.st_ctime) for stat in (each.stat() for each in files))
    return time.time() - newest >= SETTLED_SECONDS


def _memory_file() -> Path | None:
    """`weights.json` in the user's cache directory; None where there is none."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(place) if place.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "cascache" / "weights.json"


def _recall(memory: Path) -> dict[str, str]:
    """What is remembered, oldest first; nothing of a file that others may write, or that is damaged."""
    try:
        with memory.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
                return {}
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {state: digest for state, digest in found.items() if _is_digest(digest)}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _remember(memory: Path, state: str, digest: str) -> None:
    """Add an entry, whole or not at all; a directory that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = _recall(memory)
        known.pop(state, None)
        kept = dict([*known.items(), (state, digest)][-_MOST_ENTRIES:])
        handle, partial = tempfile.mkstemp(dir=memory.parent, prefix=".weights-", suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:  # mkstemp: only this user may read it
                json.dump(kept, file, indent=0)
            Path(partial).replace(memory)
        finally:
            Path(partial).unlink(missing_ok=True)
