"""A small data set with images of the sizes that people have: photographs, squares, tall screens, or none."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"photo.jpg": (640, 480), "square.png": (336, 336), "tall.png": (240, 720)}
"""Width and height."""
TALKS = [
    ("photo", ["photo.jpg"], ["<image>\nwhat is in this image?", "a red dog sat on the mat."]),
    (
        "square",
        ["square.png"],
        ["describe the picture. <image>", "two small green cats", "is it tall?", "no"],
    ),
    ("tall", ["tall.png"], ["<image>\nIs the photo tall or wide?", "It is a tall one."]),
    ("text", [], ["what is a house?", "a house with a tree."]),
    ("pair", ["square.png", "square.png"], ["<image><image>\ntwo of what?", "the blue mat"]),
    ("again", ["photo.jpg"], ["<image>\ndescribe the photo", "a tree and a house"]),
]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth shapes with a little noise: as a photograph compresses, not as noise does."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = draw.integers(-6, 7, (height, width, 1))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def write_photos(directory: Path, names: tuple[str, ...] | None = None) -> Path:
    """Write the images and a LLaVA JSON file with the talks of `names`, all of them by default."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(seed, *size).save(directory / name)
    entries = [
        {
            "id": name,
            **({"image": images if len(images) > 1 else images[0]} if images else {}),
            "conversations": [
                {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)
            ],
        }
        for name, images, turns in TALKS
        if names is None or name in names
    ]
    file = directory / "train.json"
    file.write_text(json.dumps(entries))
    return file
