"""Image settings of the hub checkpoints behind the presets, as public facts, and their processors.

    llava_onevision   llava-hf/llava-onevision-qwen2-*-ov-hf   SigLIP-384, 36 pinpoints, anyres_max_9
    llava_1_5         llava-hf/llava-1.5-*-hf                  CLIP-336, one grid of 24 × 24
    qwen2_vl          Qwen/Qwen2-VL-*-Instruct                 cells of 28 × 28 pixels
    qwen2_5_vl        Qwen/Qwen2.5-VL-*-Instruct               the same
    qwen3_vl          Qwen/Qwen3-VL-*-Instruct                 cells of 32 × 32 pixels
    internvl          OpenGVLab/InternVL3-*-hf                 up to 12 crops of 448 × 448 and the whole

The numbers are those of `preprocessor_config.json` and `processor_config.json` on the hub, as the model
pages and transformers' conversion scripts give them. Only the tokenizers are made up.
"""

from collections.abc import Callable
from typing import Any

from tests.tiny_families import make_tokenizer

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]

ONEVISION_PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
"""[[384, 384], [384, 768], ... [2304, 2304]]."""

IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
        "image_mean": HALF,
        "image_std": HALF,
        "resample": 3,
    },
    "llava_1_5": {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
    },
    "qwen2_vl": {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "qwen3_vl": {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": HALF,
        "image_std": HALF,
    },
    "internvl": {
        "size": {"height": 448, "width": 448},
        "min_patches": 1,
        "max_patches": 12,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
}
IMAGE_SETTINGS["qwen2_5_vl"] = IMAGE_SETTINGS["qwen2_vl"]

PROCESSOR_SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "num_image_tokens": 729,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "llava_1_5": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "internvl": {"image_seq_length": 256},
}
"""What counts positions besides; the Qwen families have no such setting."""


def make_processor(family: str) -> Any:
    """The processor of a hub checkpoint, with a small tokenizer."""
    return _FAMILIES[family](family)


def _llava_1_5(family: str) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(CLIPImageProcessor(**IMAGE_SETTINGS[family]), **_rest(family, "<image>", "<video>"))


def _onevision(family: str) -> Any:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    images = LlavaOnevisionImageProcessor(**IMAGE_SETTINGS[family])
    videos = LlavaOnevisionVideoProcessor(size={"height": 384, "width": 384})
    return LlavaOnevisionProcessor(images, video_processor=videos, **_rest(family, "<image>", "<video>"))


def _qwen(family: str) -> Any:
    import transformers

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    images = transformers.Qwen2VLImageProcessor(**IMAGE_SETTINGS[family])
    videos = (
        transformers.Qwen3VLVideoProcessor() if kind == "Qwen3VL" else transformers.Qwen2VLVideoProcessor()
    )
    processor = getattr(transformers, f"{kind}Processor")
    return processor(images, video_processor=videos, **_rest(family, "<|image_pad|>", "<|video_pad|>"))


def _internvl(family: str) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    more = _rest(family, "<IMG_CONTEXT>", "<video>")
    for name, token in {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }.items():
        setattr(more["tokenizer"], name, token)
        setattr(more["tokenizer"], f"{name}_id", more["tokenizer"].convert_tokens_to_ids(token))
    images = GotOcr2ImageProcessor(**IMAGE_SETTINGS[family])
    videos = InternVLVideoProcessor(size={"height": 448, "width": 448})
    return InternVLProcessor(images, video_processor=videos, **more)


def _rest(family: str, image_token: str, video_token: str) -> dict[str, Any]:
    tokenizer = make_tokenizer(image_token, video_token)
    template = tokenizer.chat_template
    return {"tokenizer": tokenizer, "chat_template": template, **PROCESSOR_SETTINGS.get(family, {})}


_FAMILIES: dict[str, Callable[[str], Any]] = {
    "llava_1_5": _llava_1_5,
    "llava_onevision": _onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
}
FAMILIES = tuple(_FAMILIES)
