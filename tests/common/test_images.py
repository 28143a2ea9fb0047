import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import images
from common.errors import DataError
from schemas.sample import ImageRef
from tests.test_house import ROOT


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(content):
    return images.read_image(ImageRef(data=content))


def gradient(dtype, top):
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))

MODES = [
    ("1", "PNG"),
    ("L", "PNG"),
    ("P", "PNG"),
    ("CMYK", "JPEG"),
    ("CMYK", "TIFF"),
    ("YCbCr", "TIFF"),
    ("RGBA", "PNG"),
    ("LA", "PNG"),
]


@pytest.mark.parametrize(("mode", "form"), MODES)
def test_opaque_modes_read_as_pillow_converts_them(mode, form):
    content = encoded(NOISE.convert(mode), form)
    found = read(content)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(
        np.asarray(found), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1), (np.float32, 255)]
)
def test_wide_grey_is_scaled_not_clipped(dtype, top):
    content = encoded(Image.fromarray(gradient(dtype, top)), "TIFF")
    found = np.asarray(read(content)).astype(int)
    assert abs(found[..., 0] - gradient(np.float64, 255)).max() <= 1
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_16_bit_png_is_scaled():
    found = np.asarray(read(encoded(Image.fromarray(gradient(np.uint16, 65535)))))
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)
    assert 120 < np.median(found) < 135


def test_lab_is_converted():
    grey = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (255, 128, 128)])
    assert np.asarray(read(encoded(grey, "TIFF"))).min() >= 250


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_becomes_white(mode):
    if mode == "RGBA":
        content = encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    elif mode == "LA":
        content = encoded(Image.new("LA", (2, 2), (10, 0)))
    else:
        colour = {"P": 0, "RGB": (10, 20, 30), "L": 10}[mode]
        content = encoded(Image.new(mode, (2, 2), colour), transparency=colour)
    assert (np.asarray(read(content)) == 255).all()


def test_half_transparent_mixes_with_white():
    assert np.asarray(read(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))).tolist() == [[[127] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    image = Image.new("RGB", (8, 16), "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    found = read(encoded(image, "PNG", exif=exif))
    red_at = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    corner = {"top": (4, 2), "bottom": (4, 13), "left": (2, 4), "right": (13, 4)}[red_at[orientation]]
    assert found.getpixel(corner) == (255, 0, 0)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read(content).getpixel((0, 0)) == (255, 0, 0)


def refused(content):
    with pytest.raises(DataError) as caught:
        read(content)
    return caught.value.reason


def test_no_image_and_no_bytes_are_unreadable():
    assert refused(b"") == "image-unreadable"
    assert refused(b"<html>not found</html>") == "image-unreadable"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_truncation_is_refused(form):
    content = encoded(NOISE, form)
    for length in range(0, len(content) * 9 // 10, max(1, len(content) // 60)):
        assert refused(content[:length]) == "image-unreadable"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_never_escapes_as_another_error(form):
    content = encoded(NOISE, form)
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            outcome = read(bytes(damaged)).mode
        except DataError as error:
            outcome = error.reason
        assert outcome in ("RGB", "image-unreadable", "image-too-large")


def test_bombs_are_refused_before_decoding(monkeypatch):
    assert refused(encoded(Image.new("1", (20_000, 20_000)))) == "image-too-large"
    monkeypatch.setattr(images, "MAX_PIXELS", 255)
    assert refused(encoded(NOISE)) == "image-too-large"
    monkeypatch.setattr(images, "MAX_PIXELS", 256)
    assert read(encoded(NOISE)).size == (16, 16)


def test_long_files_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(NOISE))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="at most 10") as caught:
        images.image_bytes(ImageRef(path="a.png"), tmp_path)
    assert caught.value.reason == "image-too-large"


def test_paths_start_from_the_root_and_hashes_are_of_the_file(tmp_path):
    content = encoded(NOISE)
    (tmp_path / "a.png").write_bytes(content)
    relative, absolute = ImageRef(path="a.png"), ImageRef(path=str(tmp_path / "a.png"))
    assert (
        images.image_bytes(relative, tmp_path) == images.image_bytes(absolute, Path("elsewhere")) == content
    )
    assert images.image_sha256(relative, tmp_path) == images.image_sha256(ImageRef(data=content))


def test_missing_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png") as caught:
        images.read_image(ImageRef(path="gone.png"), tmp_path)
    assert caught.value.reason == "image-missing"
    with pytest.raises(DataError) as caught:
        images.read_image(ImageRef(path=str(tmp_path)))
    assert caught.value.reason == "image-unreadable"
    with pytest.raises(DataError) as caught:
        images.read_image(ImageRef(path="nul\0.png"), tmp_path)
    assert caught.value.reason == "image-unreadable"


OTHER_FORMATS = ["EPS", "ICO", "PCX", "TGA", "PPM", "SGI", "PDF", "ICNS", "JPEG2000", "DDS", "XBM"]


@pytest.mark.parametrize("form", OTHER_FORMATS)
def test_only_listed_formats_are_decoded_whatever_the_name(form, tmp_path):
    picture = NOISE.convert("1") if form == "XBM" else NOISE
    content = encoded(picture, form)
    with pytest.raises(DataError, match="wanted PNG, JPEG, WEBP, GIF, BMP, TIFF") as caught:
        read(content)
    assert caught.value.reason == "image-unreadable"
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        images.read_image(ImageRef(path="a.png"), tmp_path)


@pytest.mark.parametrize("form", images.FORMATS)
def test_every_listed_format_is_decoded(form):
    assert read(encoded(NOISE, form)).size == NOISE.size


def test_devices_and_pipes_are_refused_without_being_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("/dev/zero", "/dev/stdin", str(tmp_path / "pipe"), str(tmp_path / "link"), str(tmp_path)):
        with pytest.raises(DataError, match=r"regular file|directory") as caught:
            images.image_bytes(ImageRef(path=name))
        assert caught.value.reason == "image-unreadable"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_picture_takes_little_more_memory_than_its_pixels(tmp_path, mode):
    side = int(images.MAX_PIXELS**0.5)
    Image.new(mode, (side, side)).save(tmp_path / "large", "PNG")
    assert (tmp_path / "large").stat().st_size < 1 << 20
    code = (
        "import resource; from common import images; from schemas.sample import ImageRef\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"picture = images.read_image(ImageRef(path={str(tmp_path / 'large')!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, picture.width * picture.height)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    taken_kib, pixels = map(int, done.stdout.split())
    assert taken_kib * 1024 < 14 * pixels
