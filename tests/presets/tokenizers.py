"""Tokenizers of the hub's size: special tokens at their real ids, filler where real pieces would be.

    0 .. pieces learnt from a few sentences .. filler .. | special and added tokens | head padding ..

Ids of text are small, so random models see them often; the rest of the vocabulary is there, but empty.
"""

import functools
import json
from pathlib import Path
from typing import Any

SENTENCES = [
    "what is in this image? a red dog sat on the big blue mat.",
    "describe the picture of two small green cats, please.",
    "USER: ASSISTANT: user assistant system You are a helpful assistant.",
    "Is the photo tall or wide? It is a tall one, with a tree and a house.",
]
_FIRST_SPECIAL = 151_643
_LLAMA_PIECES = 32_000
_LEARNT = 420
_TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def save_tokenizer(facts: dict[str, Any], directory: Path) -> Any:
    """Write a tokenizer's files as the hub has them; returns the tokenizer.

    Args:
        facts: Of a preset.
        directory: Where to; must exist.
    """
    tokenizer = (_llama if "<s>" in facts["special"] else _qwen)(facts)
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"processor_class": facts["processor_class"], "tokenizer_class": type(tokenizer).__name__}
    settings["added_tokens_decoder"] = {
        str(index): {name: getattr(token, name) for name in _TOKEN_FIELDS}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    if "additional" in facts["roles"]:
        settings["additional_special_tokens"] = facts["roles"]["additional"]
    else:
        settings |= {"image_token": facts["roles"]["image"], "add_bos_token": True}
        settings["extra_special_tokens"] = {"image_token": facts["roles"]["image"]}
    file.write_text(json.dumps(settings, indent=2))
    return tokenizer


def _qwen(facts: dict[str, Any]) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _byte_pieces()
    tokenizer = Qwen2Tokenizer(
        vocab=_filled(vocabulary, _FIRST_SPECIAL),
        merges=list(merges),
        model_max_length=131_072,
    )
    return _with_added(tokenizer, facts)


def _llama(facts: dict[str, Any]) -> Any:
    from transformers import LlamaTokenizer

    vocabulary, merges = _sentence_pieces()
    tokenizer = LlamaTokenizer(
        vocab=_filled(vocabulary, _LLAMA_PIECES),
        merges=list(merges),
        add_bos_token=True,
    )
    return _with_added(tokenizer, facts)


def _with_added(tokenizer: Any, facts: dict[str, Any]) -> Any:
    from tokenizers import AddedToken

    for special, table in ((True, facts["special"]), (False, facts.get("added", {}))):
        for token, _ in sorted(table.items(), key=lambda item: item[1]):
            tokenizer.add_tokens(
                [AddedToken(token, special=special, normalized=False)], special_tokens=special
            )
    wrong = {
        token: tokenizer.convert_tokens_to_ids(token)
        for token, index in {**facts["special"], **facts.get("added", {})}.items()
        if tokenizer.convert_tokens_to_ids(token) != index
    }
    assert not wrong, wrong
    assert len(tokenizer) == facts["tokens"]
    tokenizer.eos_token, tokenizer.pad_token = facts["roles"]["eos"], facts["roles"]["pad"]
    return tokenizer


def _filled(vocabulary: dict[str, int], size: int) -> dict[str, int]:
    """The vocabulary with pieces that no text reaches up to `size`."""
    return {**vocabulary, **{f"\u2400{index}": index for index in range(len(vocabulary), size)}}


@functools.cache
def _byte_pieces() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_LEARNT, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _pieces(tokenizer)


@functools.cache
def _sentence_pieces() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=_LEARNT, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _pieces(tokenizer)


def _pieces(tokenizer: Any) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    model = json.loads(tokenizer.to_str())["model"]
    merges = tuple(
        tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in model["merges"]
    )
    return model["vocab"], merges
