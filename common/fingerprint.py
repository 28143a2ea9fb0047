"""Fingerprints: equal means compatible. They are taken from behaviour, not from names.

    tokenizer        id of every token + ids of a probe text + the special tokens
    chat template    the template rendered on probe conversations, see `common.template_fingerprint`
    image processor  every setting but a few that cannot change pixels or positions, and the back end
    weights          every weight file's bytes

So the same tokenizer under another name, or saved by another library version, fits; another
vocabulary, template or image size does not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.image_settings import first_image_settings, image_settings
from common.template_fingerprint import chat_template_fingerprint
from common.weights_digest import weights_sha256 as weights_sha256  # one of the fingerprints
from schemas.manifest import Fingerprints

_PROBE_TEXT = (
    "The quick brown fox: 3.14159 + 42 = ?\n\tÄpfel, naïve — “quoted” … 你好，世界 123 日本語 🙂\n"
    "  two  spaces   and\r\nCRLF; don't, I'LL; <b>html</b> x_y-z @user #tag https://a.b/c?d=e"
)

_NAMES_IN_CONFIG = frozenset({"_name_or_path", "transformers_version"})


def fingerprints(processor: Any, *, asked: bool = False) -> Fingerprints:
    """Return what a student must match to train from a cache dumped with `processor`.

    Args:
        processor: A transformers multi-modal processor with `tokenizer` and `image_processor`.
        asked: Whether the teacher answers itself, so that its text contains the generation prompt.
    """
    return Fingerprints(
        tokenizer=tokenizer_fingerprint(processor.tokenizer),
        chat_template=chat_template_fingerprint(processor, asked=asked),
        image_processor=image_processor_fingerprint(processor),
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash every (id, token), the special tokens and the ids of a probe text."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    specials = sorted(set(tokenizer.all_special_ids))
    probe = tokenizer(_PROBE_TEXT, add_special_tokens=False).input_ids
    return _hash_json([vocabulary, specials, tokenizer.eos_token_id, list(probe)])


def image_processor_fingerprint(processor: Any) -> str:
    """Hash every setting that may change pixels or the number of image positions."""
    return _hash_json(image_settings(processor))


def first_image_fingerprint(processor: Any) -> str:
    """What `image_processor_fingerprint` was for manifests without `image_settings`."""
    return _hash_json(first_image_settings(processor))


def config_sha256(directory: Path) -> str:
    """Hash a model directory's `config.json`, without the name and version that it was saved under.

    Raises:
        ConfigError: There is none.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"{directory} has no config.json; is it a model directory?")
    settings = json.loads(file.read_text(encoding="utf-8"))
    return _hash_json({name: value for name, value in settings.items() if name not in _NAMES_IN_CONFIG})


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
