r"""A conversation as chat messages, and what a processor's chat template makes of them.

    Sample ──> [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, ...]
           ──> "<|im_start|>user\n<image>what?<|im_end|>\n..."

Whatever goes wrong inside a template comes out as one DataError that names the sample.
"""

from datetime import datetime
from typing import Any, Final

from common.errors import DataError
from schemas.sample import Sample

Messages = list[dict[str, Any]]

CURE: Final = "use a template that writes answers as they are (--chat-template FILE)"
"""What to do about most templates."""

_CONTEXT: Final = 12

_DAY: Final = datetime(2026, 1, 1)
"""What templates that write today's date are told: text may not depend on the day it is rendered on."""


def to_messages(sample: Sample) -> Messages:
    """Chat messages in the form that transformers' templates read."""
    return [{"role": turn.role, "content": [_content(part) for part in turn.parts]} for turn in sample.turns]


def _content(part: str | int) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def texts_of(messages: Messages) -> list[str]:
    """All texts, in order."""
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def with_text(messages: Messages, place: int, part: int, text: str) -> Messages:
    """The messages with another text as one part of turn `place`."""
    changed, content = list(messages), list(messages[place]["content"])
    content[part] = {"type": "text", "text": text}
    changed[place] = {**messages[place], "content": content}
    return changed


def render_messages(processor: Any, messages: Messages, where: str, *, asks: bool = False) -> str:
    """Messages under the processor's chat template.

    Args:
        processor: A processor with a chat template.
        messages: At least one.
        where: The sample, for messages of errors.
        asks: Whether to end with a generation prompt.

    Raises:
        DataError: The template is no Jinja template, refuses the conversation, fails, renders nothing, or
            prints parts as Python objects (`reason="template"`); there is no message (`turns`).
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    if not messages:
        raise DataError(f"{where}: found 0 turns, wanted a question; drop the entry", reason="turns")
    try:
        text = str(
            processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, **_calendar(processor)
            )
        )
    except TemplateSyntaxError as error:
        problem = f"is no Jinja template: line {error.lineno}: {error.message}"
        raise _refuse(where, f"{problem}; give another (--chat-template FILE)") from error
    except TemplateError as error:  # also what a template raises on purpose
        problem = f"refuses the conversation: {error}"
        raise _refuse(where, f"{problem}; change the conversation, or the template") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        problem = f"fails on the conversation: {type(error).__name__}: {error}"
        raise _refuse(where, f"{problem}; give another (--chat-template FILE)") from error
    if not text.strip():
        raise _refuse(where, "renders nothing; give another (--chat-template FILE)")
    if any(message["content"] and str(message["content"]) in text for message in messages):
        raise _refuse(
            where,
            "prints content as a Python list, so it expects plain strings; give one that reads "
            "text and image parts (--chat-template FILE)",
        )
    return text


def _calendar(processor: Any) -> dict[str, Any]:
    """The calendar of a template that asks for one; others may not be given it, or transformers warns."""
    asks = "strftime_now" in str(processor.chat_template)
    return {"strftime_now": _DAY.strftime} if asks else {}


def _refuse(where: str, problem: str) -> DataError:
    return DataError(f"{where}: the chat template {problem}", reason="template")


def around_difference(found: str, wanted: str) -> tuple[str, str]:
    """Both texts around the first place where they differ."""
    pairs = enumerate(zip(found, wanted, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(found), len(wanted)))
    start, stop = max(same - _CONTEXT, 0), same + 2 * _CONTEXT
    return found[start:stop], wanted[start:stop]
