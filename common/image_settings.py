"""All settings of an image processor: what its fingerprint covers and a manifest lists.

    image processor   every setting but a few names that are known to be harmless; its class; its back end
    processor         every plain attribute that is not about text, sound or video
    call              what the processor gives the image processor with each call

The lists name what is left out, not what is covered: an unknown setting makes two levels
differ, rather than fit by mistake. Pillow and torchvision round differently when they resize (up to 2 of
255 grey levels on smooth pictures, 23 on noise), so the back end counts.
"""

import math
from collections.abc import Mapping
from typing import Any

_NO_IMAGE_SETTING = frozenset(
    {
        "auto_map",
        "data_format",  # of arrays that a caller asks for
        "device",
        "disable_grouping",  # of images of one shape, for speed
        "feature_extractor_type",
        "image_processor_type",  # counted as the class, its back end apart
        "input_data_format",
        "model_input_names",
        "model_pixels",  # bounds before others were set: common.pixels
        "processor_class",
        "return_tensors",
    }
)
"""Settings of an image processor that change neither pixels nor positions. Any other counts, known or not."""

_NO_PROCESSOR_SETTING = frozenset(
    {
        "audio_token",
        "audio_tokenizer",
        "chat_template",  # has a fingerprint of its own
        "feature_extractor",
        "image_processor",
        "multimodal_pattern",  # made of the token names
        "tokenizer",
        "video_processor",
        "video_token",
    }
)
"""Attributes of a processor that do not affect its images, besides the ids of tokens."""

_FIRST_PIXEL_SETTINGS = [
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_pad",
    "do_rescale",
    "do_resize",
    "image_grid_pinpoints",
    "image_mean",
    "image_std",
    "max_pixels",
    "merge_size",
    "min_pixels",
    "pad_size",
    "patch_size",
    "resample",
    "rescale_factor",
    "size",
    "spatial_merge_size",
    "temporal_patch_size",
]
_FIRST_COUNT_SETTINGS = [
    "image_token",
    "num_additional_image_tokens",
    "num_image_tokens",
    "patch_size",
    "vision_aspect_ratio",
    "vision_feature_select_strategy",
]
"""All that the image fingerprint of a manifest without `image_settings` covers."""


def image_settings(processor: Any) -> dict[str, Any]:
    """Every setting that may change pixels or the number of image positions, as JSON.

    What is not known to be harmless counts. A setting that is None counts as absent, as it does for
    transformers.

    Returns:
        `class` of the image processor and `back_end` that resizes; settings by where they are:
        `image_processor`, `processor`, and `call`, which the processor gives the image processor itself.
    """
    images = processor.image_processor
    name = type(images).__name__
    own = {key: value for key, value in vars(processor).items() if _counts(key, value)}
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    found = {
        "class": name.removesuffix("Fast").removesuffix("Pil"),
        "back_end": getattr(images, "backend", "torchvision" if name.endswith("Fast") else "pil"),
        "image_processor": _without(images.to_dict(), _NO_IMAGE_SETTING),
        "processor": own,
        "call": _without(defaults.get("images_kwargs", {}), _NO_IMAGE_SETTING),
    }
    settings: dict[str, Any] = _to_json(found)
    return settings


def first_image_settings(processor: Any) -> list[dict[str, Any]]:
    """What the fingerprint of a manifest without `image_settings` covers: some settings only."""
    images = processor.image_processor.to_dict()
    settings = {name: images[name] for name in _FIRST_PIXEL_SETTINGS if images.get(name) is not None}
    counts = {name: getattr(processor, name, None) for name in _FIRST_COUNT_SETTINGS}
    return [_plain(settings), _plain({k: v for k, v in counts.items() if v is not None})]


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute of a processor may affect its images."""
    return (
        name not in _NO_PROCESSOR_SETTING
        and not name.startswith("_")
        and not name.endswith(("_token_id", "_token_ids"))
        and isinstance(value, bool | int | float | str | list | tuple | Mapping)
    )


def _without(settings: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names and not key.startswith("_")}


def _plain(value: Any) -> Any:
    """Reduce a settings object to JSON types, so that classes and enums of a library do not matter."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return round(float(value), 8)
    return str(value)


def _to_json(value: Any) -> Any:
    """A settings object as JSON: whole numbers as such, others to nine digits, nothing that is None."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): _to_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, bool | str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers, and NaN would differ from itself
    if isinstance(value, int | float):
        return int(value) if value == int(value) else float(f"{value:.9g}")
    return str(value)
