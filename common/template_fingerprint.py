"""The chat template's fingerprint: what training text depends on, and nothing else.

    probe conversations ──template──> texts ──sha256──> fingerprint
                                      + generation prompts, where the teacher answers itself

Templates with the same training text have equal fingerprints, however they are written: two that
differ only in their generation prompt, or one with `{% generation %}` marks and one without.
Where the teacher answered itself its text follows the generation prompt, so that counts too.
"""

import hashlib
import json
from typing import Any, Final

from common.errors import DataError
from common.messages import Messages, render_messages

_IMAGE: Final = {"type": "image"}
_REFUSED: Final = None  # not the message: two templates may refuse one conversation differently


def _turn(role: str, *parts: str | None) -> dict[str, Any]:
    content = [_IMAGE if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def _talk(*turns: tuple[str, *tuple[str | None, ...]]) -> Messages:
    return [_turn(*turn) for turn in turns]


_SYSTEM: Final = ("system", "You see images.")
_ASKED: Final = ("user", "what is it?")
_SHOWN: Final = ("user", None, "what is it?")
_SAID: Final = ("assistant", "A cat.")
_THOUGHT: Final = ("assistant", "<think>\nfur\n</think>\n\na cat")

_PROBES: Final = {
    "question": _talk(_SHOWN),
    "one turn": _talk(_ASKED, _SAID),
    "two turns": _talk(_SHOWN, _SAID, ("user", "sure?"), ("assistant", "yes")),
    "three turns": _talk(_ASKED, _SAID, ("user", "sure?"), ("assistant", "yes"), ("user", "so"), _SAID),
    "open end": _talk(_SHOWN, _SAID, ("user", "sure?")),
    "system": _talk(_SYSTEM, _SHOWN, _SAID, ("user", "sure?"), _SAID),
    "system, image later": _talk(_SYSTEM, _ASKED, _SAID, _SHOWN, _SAID),
    "empty system": _talk(("system", ""), _ASKED, _SAID),
    "late system": _talk(_ASKED, _SAID, _SYSTEM, ("user", "sure?"), _SAID),
    "image after text": _talk(("user", "look", None), _SAID),
    "images": _talk(("user", None, "and", None, "differ?"), _SAID, ("user", None, None, "now?"), _SAID),
    "image alone": _talk(("user", None), _SAID),
    "several texts": _talk(("user", "look.", "what?"), ("assistant", "a", "cat")),
    "white space": _talk(("user", "  what is it?\n\n"), ("assistant", "\n a  cat \n"), _ASKED, _SAID),
    "signs": _talk(("user", '"<b>" & {{ 7 }} \\n äöü'), ("assistant", "ONE two 'Three' {% 4 %} <5>")),
    "think": _talk(_ASKED, _THOUGHT),
    "earlier think": _talk(_SHOWN, _THOUGHT, ("user", "sure?"), _SAID),
    "later think": _talk(_SHOWN, _SAID, ("user", "sure?"), _THOUGHT),
    "answer first": _talk(_SAID, _ASKED, _SAID),
    "questions in a row": _talk(_ASKED, ("user", "what?"), _SAID),
    "answers in a row": _talk(_ASKED, _SAID, ("assistant", "yes")),
}


def chat_template_fingerprint(processor: Any, *, asked: bool = False) -> str:
    """Hash the template rendered on probe conversations.

    Args:
        processor: A processor with a chat template.
        asked: Whether the teacher answers itself; the questions before its answers count too.
    """
    texts = [_render(processor, talk) for talk in _PROBES.values()]
    if asked:
        texts += [_render(processor, talk[:-1], asks=True) for talk in _PROBES.values() if len(talk) > 1]
    return _hash(texts)


def former_chat_template_fingerprint(processor: Any) -> str | None:
    """The fingerprint of caches that were dumped while it still covered generation prompts.

    None where the template refuses its probe conversations: no such cache exists.
    """
    probes = (
        _talk(("user", "What is it?")),
        _talk(("user", None, "What is it?"), _SAID, ("user", "Sure?"), ("assistant", "Yes.")),
    )
    texts = [_render(processor, talk, asks=asks) for talk in probes for asks in (False, True)]
    return None if _REFUSED in texts else _hash(texts)


def _render(processor: Any, messages: Messages, *, asks: bool = False) -> str | None:
    try:
        return render_messages(processor, messages, "a probe", asks=asks)
    except DataError:
        return _REFUSED


def _hash(texts: list[str | None]) -> str:
    text = json.dumps(texts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
