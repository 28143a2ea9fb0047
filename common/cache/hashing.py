"""Sizes and SHA-256 of files: what seals promise, and whether it still holds."""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Final

from common.cache.store import Store
from schemas.manifest import FileSeal

_READ_BYTES: Final = 8 << 20


def hash_files(directory: Path) -> dict[str, FileSeal]:
    """Size and SHA-256 of every file below a directory, by relative path."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): hash_file(p) for p in files}


def hash_file(path: Path) -> FileSeal:
    """Size and SHA-256 of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSeal(size_bytes=file.tell(), sha256=digest)


def file_fault(store: Store, key: str, size: int | None, wanted: FileSeal, *, deep: bool) -> str | None:
    """What is wrong with a sealed file, if anything.

    Args:
        store: Where it is.
        key: Which one.
        size: What a listing says it has; None when it is not listed.
        wanted: What was sealed.
        deep: Whether to hash it.
    """
    if size is None:
        return "is missing"
    if size != wanted.size_bytes:
        return f"has {size} bytes, its seal says {wanted.size_bytes}"
    if not deep:
        return None
    digest = hashlib.sha256()
    try:
        with closing(store.open(key)) as blob:
            for offset in range(0, blob.size, _READ_BYTES):
                digest.update(blob.read(offset, _READ_BYTES))
    except OSError as error:
        return f"cannot be read ({error})"
    return None if digest.hexdigest() == wanted.sha256 else "its SHA-256 is not the sealed one"
