"""Bytes on the disk before a name says that they are there."""

import os
from pathlib import Path


def sync_tree(directory: Path) -> None:
    """Flush every file of a directory, its sub-directories and the directory itself to the disk.

    Raises:
        OSError: The disk refuses.
    """
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries: what was renamed into it stays."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
