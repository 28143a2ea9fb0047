"""Image size → positions, for the processors of the hub checkpoints: what plans and docs count with."""

import pytest

from common.grids import image_layout
from common.pixels import apply_pixels
from tests.hub_settings import FAMILIES, make_processor

SIZES = [(336, 336), (384, 384), (480, 640), (960, 1280), (1080, 1920), (3024, 4032)]
"""Height × width; the last is a photo of 12 megapixels."""

OWN = {
    "llava_1_5": (576, 576, 576, 576, 576, 576),
    "llava_onevision": (1485, 1485, 2929, 7309, 7269, 7309),
    "qwen2_vl": (144, 196, 391, 1564, 2691, 15552),
    "qwen2_5_vl": (144, 196, 391, 1564, 2691, 15552),
    "qwen3_vl": (100, 144, 300, 1200, 2040, 11844),
    "internvl": (256, 256, 3328, 3328, 2304, 3328),
}
DEFAULT = {
    "qwen2_vl": (144, 196, 391, 1230, 1222, 1230),
    "qwen2_5_vl": (144, 196, 391, 1230, 1222, 1230),
    "qwen3_vl": (100, 144, 300, 1200, 1222, 1230),
}
"""Without a flag: at most 1,280 positions, where the model has a bound to lower."""


def positions(processor: object) -> tuple[int, ...]:
    return tuple(image_layout(processor, *size).num_positions for size in SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_under_the_models_own_settings(family: str):
    processor = make_processor(family)
    assert positions(processor) == OWN[family]
    counted = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in SIZES])
    markers = 2 if family == "internvl" else 0  # counted with the image by transformers, not by the cache
    assert [num - markers for num in counted["num_image_tokens"]] == list(OWN[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_without_flags(family: str):
    processor = make_processor(family)
    apply_pixels(processor, least=None, most=None, level=None, default=True)
    assert positions(processor) == DEFAULT.get(family, OWN[family])
