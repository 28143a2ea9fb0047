"""Encoded image files in the columns of a block.

    image_keys        key sha(a) | key sha(b) | key sha(a)     one entry an image and prefix
    image_file_sizes  size of a  | size of b                   one entry a different file
    image_files       bytes of a, bytes of b

Samples of one image share a block, so that a file is stored once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cache.shard import AGAIN
from common.errors import DataError, PartCorrupt
from common.record import VisualRecord
from schemas.arrays import IMAGE_FILE_ARRAYS, KEY_BYTES, SHA_BYTES

Array = NDArray[Any]


def pack_image_files(images: Sequence[VisualRecord]) -> dict[str, Array]:
    """The columns of a block's image files.

    Raises:
        DataError: An image comes without its file, or with another one.
    """
    files: dict[str, bytes] = {}
    for image in images:
        if image.encoded is None:
            raise DataError(
                f"image {image.key} comes without its file, and the cache keeps them", reason="image"
            )
        if image.image_sha256 not in files:
            found = hashlib.sha256(image.encoded).hexdigest()
            if found != image.image_sha256:
                raise DataError(
                    f"image {image.key} has sha256 {found}, not {image.image_sha256}", reason="image"
                )
            files[found] = image.encoded
    sizes = [len(data) for data in files.values()]
    return {
        "image_file_sizes": np.array(sizes, np.int32),
        "image_files": np.frombuffer(b"".join(files.values()), np.uint8),
    }


def image_hashes(columns: Mapping[str, Array]) -> list[str]:
    """SHA-256 of each image entry of a block.

    Raises:
        PartCorrupt: The table ends within an entry.
    """
    keys = columns.get("image_keys", np.empty(0, np.uint8))
    if len(keys) % (KEY_BYTES + SHA_BYTES):
        raise PartCorrupt(f"a table of images has {len(keys)} bytes, which is no number of entries; {AGAIN}")
    return [bytes(row[KEY_BYTES:]).hex() for row in keys.reshape(-1, KEY_BYTES + SHA_BYTES)]


def unpack_image_files(columns: Mapping[str, Array], where: str) -> dict[str, bytes]:
    """Image files by SHA-256, each proven against it.

    Args:
        columns: `image_keys`, and both arrays of `IMAGE_FILE_ARRAYS`.
        where: Name of the block for messages.

    Raises:
        PartCorrupt: They are not what their hashes say.
    """
    wanted = list(dict.fromkeys(image_hashes(columns)))
    sizes, data = (columns.get(name, np.empty(0, np.uint8)) for name in IMAGE_FILE_ARRAYS)
    lengths = sizes.astype(np.int64)
    if len(lengths) != len(wanted) or (lengths < 0).any() or int(lengths.sum()) != len(data):
        raise PartCorrupt(
            f"{where}: {len(sizes)} image files of {len(data)} bytes contradict each other; {AGAIN}"
        )
    ends = np.cumsum(lengths).tolist()
    files = {}
    for sha256, start, stop in zip(wanted, [0, *ends], ends, strict=False):
        files[sha256] = bytes(data[start:stop])
        if hashlib.sha256(files[sha256]).hexdigest() != sha256:
            raise PartCorrupt(f"{where}: image file {sha256} is not what its name says; {AGAIN}")
    return files
