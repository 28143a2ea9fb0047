"""Random-weight vision-language models of six families, small enough to build in a second.

Each directory loads in transformers and in vLLM: weights are saved under the names that hub
checkpoints use, head_dim is 32 (vLLM's CPU attention), and logits are spread so that a top-k set is
well conditioned.
"""

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}MARK"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the a cat dog sat on mat red blue green big small what is in this image describe picture of two"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
VOCAB = 1024
SIDE = 56


def build(family: str, directory: Path, *, vocab: int = VOCAB, seed: int = 0) -> Path:
    """Build one of FAMILIES under `directory / family`, unless it is there already."""
    target = directory / family
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model, processor = FAMILIES[family](vocab)
        _save(model, processor, partial, seed)
        partial.rename(target)
    return target


@functools.cache
def _tokenizer_json(image_token: str, video_token: str) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    words = WORDS.split()
    corpus = [" ".join(draw.choice(words) for _ in range(12)) + draw.choice(".?!") for _ in range(300)]
    specials = [*SPECIALS, image_token, video_token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in specials])
    return tokenizer.to_str()


def make_tokenizer(image_token: str = "<image>", video_token: str = "<video>") -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(image_token, video_token)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )
    mark = image_token if image_token == "<image>" else f"<|vision_start|>{image_token}<|vision_end|>"
    tokenizer.chat_template = TEMPLATE.replace("MARK", mark)
    return tokenizer


def _text_config(tokenizer: Any, vocab: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _siglip() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        vision_use_head=False,
    )


def _llava(vocab: int, tower: Any, images: Any, strategy: str, extra: int) -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = make_tokenizer()
    config = LlavaConfig(
        vision_config=tower,
        text_config=_text_config(tokenizer, vocab),
        tie_word_embeddings=False,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // 14) ** 2,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1 if strategy == "full" else -2,
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=tokenizer.chat_template,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_siglip(vocab: int) -> tuple[Any, Any]:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _llava(vocab, _siglip(), images, "full", 0)


def _llava_clip(vocab: int) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        projection_dim=64,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return _llava(vocab, tower, images, "default", 1)


def _onevision(vocab: int) -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = make_tokenizer()
    pins = [[56, 56], [56, 112], [112, 56], [112, 112]]
    size = {"height": SIDE, "width": SIDE}
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text_config(tokenizer, vocab),
        image_grid_pinpoints=pins,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pins),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def _qwen_text(tokenizer: Any, vocab: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **more.pop("rope", {})}
    return {
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": rope,
        **more,
    }


def _qwen2_5_vl(vocab: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>")
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer, vocab),
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=tokenizer.chat_template,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(vocab: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>")
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _qwen_text(tokenizer, vocab, head_dim=32, rope={"mrope_interleaved": True})
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **_qwen_ids(tokenizer)
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=tokenizer.chat_template,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _internvl(vocab: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json("<IMG_CONTEXT>", "<video>")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens={
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    tokenizer.chat_template = TEMPLATE.replace("MARK", "<IMG_CONTEXT>")
    tower = InternVLVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=(SIDE, SIDE),
        patch_size=(14, 14),
    )
    config = InternVLConfig(
        vision_config=tower,
        text_config=_text_config(tokenizer, vocab),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(SIDE // 28) ** 2,
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=(SIDE // 28) ** 2,
        chat_template=tokenizer.chat_template,
    )
    return InternVLForConditionalGeneration(config), processor


def _save(model: Any, processor: Any, directory: Path, seed: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.5 if "lm_head" in name else 0.08
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.float().save_pretrained(directory)
    processor.save_pretrained(directory)
    file = directory / "model.safetensors"
    state = load_file(file)
    if type(processor).__name__ == "InternVLProcessor":
        return
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file(
        {name.replace(old, new, 1) if name.startswith(old) else name: value for name, value in state.items()},
        file,
        metadata={"format": "pt"},
    )


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "llava_siglip": _llava_siglip,
    "llava_clip": _llava_clip,
    "llava_onevision": _onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}
