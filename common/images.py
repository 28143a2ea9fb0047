"""Images in: encoded bytes, their hash, and 8-bit RGB pixels from any mode Pillow reads.

    ImageRef ──> image_bytes() ──> image_sha256()     what caches bind to
                       └─────────> read_image()       EXIF-rotated, alpha over white, 16 bits scaled to 8

Sizes are checked before pixels are decoded, so a small file cannot claim all memory.
"""

import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DataError
from schemas.sample import ImageRef

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_000_000
"""Largest width × height decoded; just under the size at which Pillow itself starts to warn."""
MAX_BYTES = 512 * 2**20
"""Largest encoded file read."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats decoded, detected by content. Pillow supports forty more, some of which start other programs."""

_STRIP_PIXELS = 1 << 20

# What Pillow's decoders raise on damaged files besides their own errors.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    NotImplementedError,
    AttributeError,
    struct.error,
    zlib.error,
)


def image_path(ref: ImageRef, root: str | Path | None = None) -> Path | None:
    """Where the image is stored: its path, from `root` when relative; None for inline bytes."""
    if ref.path is None:
        return None
    return Path(root or "") / ref.path


def image_bytes(ref: ImageRef, root: str | Path | None = None) -> bytes:
    """The encoded image (PNG, JPEG, ...), as the data holds it.

    Args:
        ref: Path or inline bytes.
        root: Directory that a relative path starts from; the working directory by default.

    Raises:
        DataError: `image-missing`: there is no such file; `image-unreadable`: it is empty or cannot be
            read; `image-too-large`: it has more than `MAX_BYTES` bytes.
    """
    path = image_path(ref, root)
    where = str(path or "inline image")
    if path is None:
        encoded = ref.data or b""
    else:
        try:
            encoded = _read_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"image {path} does not exist; fix the data or point --image-root at the images",
                reason="image-missing",
            ) from error
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise _unreadable(where, str(error)) from error
    if not encoded:
        raise _unreadable(where, "found 0 bytes")
    return encoded


def _read_regular(path: Path) -> bytes:
    """A file's bytes; a device would never end, and a pipe would wait for a writer."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _unreadable(str(path), "it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise DataError(
                f"image {path} has {status.st_size} bytes, at most {MAX_BYTES} are read; shrink it",
                reason="image-too-large",
            )
        return file.read(MAX_BYTES + 1)


def image_sha256(ref: ImageRef, root: str | Path | None = None) -> str:
    """Hex digest of the encoded bytes. Raises as `image_bytes` does."""
    return hashlib.sha256(image_bytes(ref, root)).hexdigest()


def read_image(ref: ImageRef, root: str | Path | None = None) -> "Image":
    """The image as 8-bit RGB, upright.

    Palettes and CMYK are converted, transparency is laid over white, 16-bit grey is scaled to 8 bits
    (not clipped, as `Image.convert` does), EXIF rotation is applied; of an animation the first frame.

    Args:
        ref: Path or inline bytes.
        root: Directory that a relative path starts from; the working directory by default.

    Raises:
        DataError: As `image_bytes`, and `image-unreadable`: it is no image, or a damaged one;
            `image-too-large`: it has more than `MAX_PIXELS` pixels.
    """
    return decode_image(image_bytes(ref, root), where=str(image_path(ref, root) or "inline image"))


def decode_image(encoded: bytes, *, where: str) -> "Image":
    """`read_image` for bytes already read; `where` names them in errors."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(where, f"{image.width}×{image.height} pixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise _unreadable(where, f"{len(encoded)} bytes in none of the formats that are decoded") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(where, str(error)) from error
    except DataError:
        raise
    except _DAMAGED as error:
        raise _unreadable(where, f"damaged or truncated: {error}") from error


def _unreadable(where: str, found: str) -> DataError:
    return DataError(
        f"image {where} cannot be read: {found}; wanted {', '.join(FORMATS)}, replace it",
        reason="image-unreadable",
    )


def _too_large(where: str, found: str) -> DataError:
    return DataError(
        f"image {where} is too large: {found}; at most {MAX_PIXELS} pixels are decoded, shrink it",
        reason="image-too-large",
    )


def _to_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    # A few rows at a time: whole, the steps between would take ten times the memory of the picture itself.
    top, result = _white_level(image), Image.new("RGB", image.size)
    for first, strip in _strips(image):
        result.paste(_strip_to_rgb(strip, top), (0, first))
    return result


def _strips(image: "Image") -> "Iterator[tuple[int, Image]]":
    """Rows of an image, `_STRIP_PIXELS` at a time, each with the number of its first row."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for first in range(0, image.height, rows):
        yield first, image.crop((0, first, image.width, min(first + rows, image.height)))


def _white_level(image: "Image") -> float:
    """The grey that becomes 255: 65535 for integers; for floats 1 when none exceeds it, else 255."""
    if image.mode != "F":
        return 65535.0
    largest = max(np.nan_to_num(np.asarray(strip)).max(initial=0.0) for _, strip in _strips(image))
    return 1.0 if largest <= 1 else 255.0


def _strip_to_rgb(image: "Image", top: float) -> "Image":
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _lab_to_rgb(image: "Image") -> "Image":
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted
