"""Load a model's processor, set as the user wants it, and refuse one that cannot be used.

    model directory or hub id ──> AutoProcessor ──options──> processor ──> chat, layout, fingerprints

What is set here is part of the identity of a level: the fingerprints are taken from the processor as it
is after the options were applied, so teacher and student must be given the same ones.
"""

from pathlib import Path
from typing import Any

from common.errors import ConfigError
from schemas.base import Frozen


class ProcessorOptions(Frozen):
    """What a user may set of a processor; every command that loads one has these settings."""

    chat_template: str | None = None
    """File with the chat template to use in place of the model's own (Jinja, as chat_template.jinja)."""


def load_processor(path: str, *, revision: str | None = None, options: ProcessorOptions | None = None) -> Any:
    """The transformers processor of a model directory or hub id, with the options applied.

    Args:
        path: Directory or hub id.
        revision: Revision of a hub model.
        options: What the user set; a command's settings are such options.

    Raises:
        ConfigError: There is no processor, no chat template, or no fast tokenizer; an option is wrong.
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
            f"{path} holds no processor that transformers can load ({error}); point at a vision-language "
            "model directory with tokenizer, chat template and preprocessor_config.json"
        ) from error
    if options is not None:
        apply_options(processor, options)
    check_processor(processor, path)
    return processor


def apply_options(processor: Any, options: ProcessorOptions) -> None:
    """Set a processor as the options want it, in place.

    Raises:
        ConfigError: A file is not there, or is not text.
    """
    if options.chat_template is not None:
        try:
            processor.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--chat-template {options.chat_template} cannot be read ({error}); "
                "give a file with a Jinja template"
            ) from error


def read_vocab_rows(path: str, *, revision: str | None = None) -> int:
    """Rows of a model's head, padding included, from its configuration alone.

    Raises:
        ConfigError: There is no configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} holds no model configuration ({error}); point at a model") from error
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
            "tokenizer; mend processor_config.json, or use the tokenizer that belongs to it"
        )
