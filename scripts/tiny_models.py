"""What the shipped models are made of: one chat template, one tokenizer, one image processor, one tower.

    tiny-student    64 wide, 2 layers ─┐
    tiny-l1         96 wide, 3 layers ─┼─ share tokenizer, template, processor and SigLIP tower (96 wide)
    tiny-l2        128 wide, 4 layers ─┘

Attention heads are 32 wide, which vLLM's CPU attention needs; heads are padded to a multiple of 64
rows, more than the tokenizer has tokens, as in the Qwen models.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PATCH = 8
IMAGE_SIZE = 48
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2
TOWER_WIDTH = 96
HEAD_WIDTH = 32
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' ' + message['role'] | upper + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{{ ' ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The shape of a text model."""

    width: int
    """Hidden size; heads are `width / 32`."""
    layers: int
    """Transformer blocks."""
    mlp: int
    """Width inside the MLP."""


SIZES = {
    "tiny-student": Size(64, 2, 128),
    "tiny-l1": Size(96, 3, 256),
    "tiny-l2": Size(128, 4, 384),
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over rendered conversations; every byte has a token, so any text can be read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """48×48 pixels scaled to [−1, 1], 36 image tokens, the shared chat template."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlavaForConditionalGeneration:
    """A fresh model.

    `initializer_range = width ** -0.5` is what makes models this small learn: the usual 0.02 is
    several times slower.
    """
    torch.manual_seed(seed)
    text = Qwen2Config(
        vocab_size=(len(tokenizer) // 64 + 1) * 64,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD_WIDTH,
        num_key_value_heads=size.width // HEAD_WIDTH,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=size.width**-0.5,
    )
    tower = SiglipVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=3 * TOWER_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=TOWER_WIDTH // HEAD_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_PATCHES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    nn.init.normal_(projector.linear_1.weight, std=0.4 * projector.linear_1.in_features**-0.5)
    nn.init.normal_(projector.linear_2.weight, std=projector.linear_2.in_features**-0.5)
    return model


def round_weights(model: nn.Module) -> None:
    """Round every weight to the nearest float16, in place, so that what is measured is what is stored."""
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.copy_(weight.half().float())


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a model directory that transformers and vLLM load.

    Weights lie as float16 to halve the repository's share; the config says float32, and loading as
    float32 is exact (see `round_weights`). transformers names the tower `vision_tower.*`, hub
    checkpoints and vLLM `vision_tower.vision_model.*`; transformers reads both.
    """
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    path = directory / "model.safetensors"
    weights = {_hub_name(name): weight.half() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _hub_name(name: str) -> str:
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name
