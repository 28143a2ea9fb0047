"""Load a model's processor, set as the user wants it, and refuse one that cannot be used.

    model directory or hub id ──> AutoProcessor ──options──> processor ──> chat, layout, fingerprints

What is set here is part of the identity of a level: the fingerprints are taken from the processor as it
is after the options were applied, so teacher and student must be given the same ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.pixels import LeastPixels, Pixels, apply_pixels, bounds_in
from common.render import check_template
from common.settings import validate_settings
from schemas.base import Frozen
from schemas.manifest import Manifest

_COUNTED_WITH: dict[str, dict[str, Any]] = {
    "LlavaProcessor": {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "LlavaOnevisionProcessor": {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
}
"""What a processor counts an image's positions with, and the values of LLaVA-1.5 and of LLaVA-OneVision."""


class ProcessorOptions(Frozen):
    """What a user may set of a processor; every command that loads one has these settings."""

    chat_template: str | None = None
    """File with the chat template to use in place of the model's own: chat_template.jinja or .json."""
    max_pixels: Pixels | None = None
    """Scale larger images down to this area, such as 1003520 or 1.3MP. For Qwen-VL, where a position covers
    28 × 28 or 32 × 32 pixels; such an image has to fit the dump's --max-len. Default: the cache's bound,
    else 1,280 positions or the model's own bound, whichever is less."""
    min_pixels: LeastPixels | None = None
    """Scale smaller images up to this area, for Qwen-VL. Default: the bound of the cache or the model."""


def read_options(arguments: argparse.Namespace) -> ProcessorOptions:
    """Options from the flags of a command without a settings model; flags that it lacks are not set.

    Raises:
        ConfigError: A flag has an invalid value.
    """
    values = {name: getattr(arguments, name, None) for name in ProcessorOptions.model_fields}
    return validate_settings(ProcessorOptions, values, "cascache")


def load_processor(
    path: str,
    *,
    revision: str | None = None,
    options: ProcessorOptions | None = None,
    level: Manifest | None = None,
) -> Any:
    """The transformers processor of a model directory or hub id, with the options applied.

    Args:
        path: Directory or hub id.
        revision: Revision of a hub model.
        options: What the user set; a command's settings are such options.
        level: The level that it has to fit, whose image bounds hold where the user set none.

    Raises:
        ConfigError: There is no processor, no chat template, or no fast tokenizer; an option is wrong; the
            chat template does not parse, fails on every conversation, or renders nothing.
    """
    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise ConfigError(f"{path} needs transformers ({error}): pip install 'cascache[student]'") from error
    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except ImportError as error:  # most families' processors load torchvision, for videos if nothing else
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the processor of {path} does not load ({cause}); pip install 'cascache[student]'"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} has no processor that transformers can load ({error}); point at a vision-language "
            "model directory with tokenizer, chat template, and processor_config.json or "
            "preprocessor_config.json"
        ) from error
    options = options or ProcessorOptions()
    apply_options(processor, options)
    check_processor(processor, path)
    given = options.chat_template
    check_template(processor, path if given is None else f"--chat-template {given}")
    apply_pixels(
        processor,
        least=options.min_pixels,
        most=options.max_pixels,
        level=None if level is None else bounds_in(level.image_settings),
        default=level is None,
    )
    return processor


def apply_options(processor: Any, options: ProcessorOptions) -> None:
    """Set a processor's chat template as the options want it, in place.

    Raises:
        ConfigError: A file does not exist, or is not text.
    """
    if options.chat_template is not None:
        processor.chat_template = _read_template(options.chat_template)


def _read_template(file: str) -> str:
    """A chat template from a Jinja file, or from the JSON file that older checkpoints keep theirs in."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {file} cannot be read ({error}); give a file with a Jinja template"
        ) from error
    if not text.strip():
        raise ConfigError(f"--chat-template {file} is empty; give a file with a Jinja template")
    if not file.endswith(".json"):
        return text
    try:
        found = json.loads(text)["chat_template"]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if not isinstance(found, str):
        raise ConfigError(
            f"--chat-template {file} has no text called chat_template; give a file with a Jinja template"
        )
    return found


def read_vocab_rows(path: str, *, revision: str | None = None) -> int:
    """Rows of a model's head, padding included, from its configuration alone.

    Raises:
        ConfigError: There is no configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} has no model configuration ({error}); point at a model") from error
    return int(config.get_text_config().vocab_size)


def check_processor(processor: Any, path: str) -> None:
    """Refuse a processor that cannot render, tokenise with offsets, or mark images.

    Raises:
        ConfigError: What is missing, and where it was looked for.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"{path} is no vision-language model: {type(processor).__name__} lacks tokenizer or images"
        )
    if not processor.chat_template:
        raise ConfigError(f"{path} has no chat template; add chat_template.jinja beside its tokenizer")
    if not tokenizer.is_fast:
        raise ConfigError(f"{path} has only a slow tokenizer, which gives no offsets; add tokenizer.json")
    if not isinstance(getattr(processor, "image_token", None), str):
        raise ConfigError(f"{path}: {type(processor).__name__} names no image token")
    if processor.image_token not in tokenizer.get_vocab():
        raise ConfigError(
            f"{path}: the processor marks images with {processor.image_token!r}, which is no token of its "
            "tokenizer; fix processor_config.json, or use the tokenizer that belongs to it"
        )
    _check_counts(processor, path)


def _check_counts(processor: Any, path: str) -> None:
    """Refuse a processor without the settings to count an image's positions, as in early revisions."""
    needed = _COUNTED_WITH.get(type(processor).__name__, {})
    missing = [name for name in needed if getattr(processor, name, None) is None]
    if missing:
        raise ConfigError(
            f"{path}: its {type(processor).__name__} lacks {', '.join(missing)}, so that the "
            "positions of an image cannot be counted; take the checkpoint's current revision, or write "
            f"processor_config.json with what fits its vision tower, such as {json.dumps(needed)}"
        )
