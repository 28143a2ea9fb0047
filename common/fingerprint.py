"""Fingerprints: equal means compatible. They are taken from behaviour, not from names.

    tokenizer        id of every token + ids of a probe text + the special tokens
    chat template    the template rendered on probe conversations
    image processor  every setting but a few that cannot change pixels or positions, and the back end
    weights          every weight file's bytes

So the same tokenizer under another name, or saved by another library version, fits; another
vocabulary, template or image size does not.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.image_settings import first_image_settings, image_settings
from schemas.manifest import Fingerprints

_PROBE_TEXT = (
    "The quick brown fox: 3.14159 + 42 = ?\n\tÄpfel, naïve — “quoted” … 你好，世界 123 日本語 🙂\n"
    "  two  spaces   and\r\nCRLF; don't, I'LL; <b>html</b> x_y-z @user #tag https://a.b/c?d=e"
)

_PROBE_CONVERSATIONS = (
    [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ],
)

_NAMES_IN_CONFIG = frozenset({"_name_or_path", "transformers_version"})

_CHUNK_BYTES = 1 << 20


def fingerprints(processor: Any) -> Fingerprints:
    """Return what a student must match to train from a cache dumped with `processor`.

    Args:
        processor: A transformers multi-modal processor with `tokenizer` and `image_processor`.
    """
    return Fingerprints(
        tokenizer=tokenizer_fingerprint(processor.tokenizer),
        chat_template=chat_template_fingerprint(processor),
        image_processor=image_processor_fingerprint(processor),
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash every (id, token), the special tokens and the ids of a probe text."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    specials = sorted(set(tokenizer.all_special_ids))
    probe = tokenizer(_PROBE_TEXT, add_special_tokens=False).input_ids
    return _hash_json([vocabulary, specials, tokenizer.eos_token_id, list(probe)])


def chat_template_fingerprint(processor: Any) -> str:
    """Hash the template rendered on probe conversations, with and without the generation prompt."""
    render = processor.apply_chat_template
    return _hash_json(
        [
            render(conversation, tokenize=False, add_generation_prompt=prompt)
            for conversation in _PROBE_CONVERSATIONS
            for prompt in (False, True)
        ]
    )


def image_processor_fingerprint(processor: Any) -> str:
    """Hash every setting that may change pixels or the number of image positions."""
    return _hash_json(image_settings(processor))


def first_image_fingerprint(processor: Any) -> str:
    """What `image_processor_fingerprint` was for manifests without `image_settings`."""
    return _hash_json(first_image_settings(processor))


def weights_sha256(directory: Path) -> str:
    """Hash a model directory's weight files, in name order.

    Args:
        directory: A local model directory, or the snapshot directory of a hub model.

    Raises:
        ConfigError: The directory holds no weight file.
    """
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    if not files:
        raise ConfigError(f"{directory} holds no *.safetensors or *.bin weights; is it a model directory?")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def config_sha256(directory: Path) -> str:
    """Hash a model directory's `config.json`, without the names and versions of who saved it.

    Raises:
        ConfigError: There is none.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"{directory} has no config.json; is it a model directory?")
    settings = json.loads(file.read_text(encoding="utf-8"))
    return _hash_json({name: value for name, value in settings.items() if name not in _NAMES_IN_CONFIG})


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
