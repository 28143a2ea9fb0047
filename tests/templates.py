"""Chat templates of the shapes that published vision-language models have, written for these tests.

    TEMPLATES[name]         Jinja text with the special tokens of its family
    IMAGE_MARKS[name]       what an image is in it
    SPECIALS[name]          special tokens it writes, the image mark's aside
    fit(name, mark)         the same with another mark for an image

An assistant turn under each, `_` for a space and `/` for a line break:

    llava15            ASSISTANT:_answer_                          generation prompt ASSISTANT:
    llava15_eos        ASSISTANT:_answer</s>_
    onevision_hub      <|im_start|>assistant_/answer<|im_end|>     generation prompt assistant/: no prefix
    onevision          <|im_start|>assistant/answer<|im_end|>
    qwen2_5_vl         <|im_start|>assistant/answer<|im_end|>/     behind a default system turn
    qwen3_vl, internvl the same, without
    qwen3_5_think      assistant/<think>//</think>//answer         after the last question; before it
    qwen3_5_nothink    the same                                    assistant/answer
    gemma3             <start_of_turn>model/answer<end_of_turn>/

`_marked` variants put the answer between `{% generation %}` marks as the hub's LLaVA templates do: with
the line break before it or the space behind it, without the end of the turn.
"""

from typing import Any, Final

_LOOP: Final = "{% for turn in messages %}@body@{% endfor %}"
_IMAGES: Final = "{% for part in turn.content if part.type == 'image' %}@image@{% endfor %}"
_TEXTS: Final = "{% for part in turn.content if part.type == 'text' %}@text@{% endfor %}"
_PART: Final = "{% if part.type == 'image' %}@image@{% else %}@text@{% endif %}"
_PARTS: Final = "{% for part in turn.content %}" + _PART + "{% endfor %}"
_CHATML_PROMPT: Final = r"<|im_start|>assistant\n"
_VISION: Final = "<|vision_start|><|image_pad|><|vision_end|>"


def _loop(body: str, prompt: str) -> str:
    """All turns, then the generation prompt."""
    return _LOOP.replace("@body@", body) + "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"


def _parts(text: str = "{{ part.text }}", *, image: str, pattern: str = _PARTS) -> str:
    return pattern.replace("@image@", image).replace("@text@", text)


def _by_role(answered: str, asked: str) -> str:
    return "{% if turn.role == 'assistant' %}" + answered + "{% else %}" + asked + "{% endif %}"


def _marked(text: str) -> str:
    return "{% generation %}" + text + "{% endgeneration %}"


def _llava15(text: str = "{{ part.text + ' ' }}", answer: str = "{{ part.text + ' ' }}") -> str:
    """Images first, each with a line break; a space behind every text."""
    name = "{% if turn.role != 'system' %}{{ turn.role | upper + ': ' }}{% endif %}"
    images = _parts(image=r"{{ '<image>\n' }}", pattern=_IMAGES)
    texts = _by_role(_TEXTS.replace("@text@", answer), _TEXTS.replace("@text@", text))
    return _loop(name + images + texts, "ASSISTANT:")


def _onevision(header: str, answer: str = r"{{ '\n' + part.text }}") -> str:
    """Images first; each text begins with a line break."""
    texts = _by_role(_TEXTS.replace("@text@", answer), _TEXTS.replace("@text@", r"{{ '\n' + part.text }}"))
    body = header + _parts(image="<image>", pattern=_IMAGES) + texts + "<|im_end|>"
    return _loop(body, _CHATML_PROMPT)


def _chatml(
    image: str, *, first: str = "", text: str = "{{ part.text }}", end: str = r"{{ '<|im_end|>\n' }}"
) -> str:
    """Parts in their order between the line that names the role and the end of the turn."""
    header = r"{{ '<|im_start|>' + turn.role + '\n' }}"
    return _loop(first + header + _parts(text, image=image) + end, _CHATML_PROMPT)


def _qwen3_5(prompt: str) -> str:
    """Trimmed texts; answers behind the last question gain a think block, earlier ones lose theirs."""
    text_of = "{% macro text_of(turn) %}" + _parts(image=_VISION) + "{% endmacro %}"
    find_last = (
        "{% set last = namespace(question=-1) %}"
        "{% for turn in messages %}"
        "{% if turn.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
        "{% endfor %}"
        "{% if last.question < 0 %}{{ raise_exception('a conversation needs a user turn') }}{% endif %}"
    )
    answer = (
        "{% set said = namespace(thought='', text=text_of(turn) | trim) %}"
        "{% if '</think>' in said.text %}"
        r"{% set said.thought = (said.text.split('</think>') | first).split('<think>') | last | trim %}"
        r"{% set said.text = (said.text.split('</think>') | last).lstrip('\n') %}"
        "{% endif %}"
        "{% if loop.index0 > last.question %}"
        r"{{ '<think>\n' + said.thought + '\n</think>\n\n' }}"
        "{% endif %}{{ said.text }}"
    )
    header = r"{{ '<|im_start|>' + turn.role + '\n' }}"
    body = header + _by_role(answer, "{{ text_of(turn) | trim }}") + r"{{ '<|im_end|>\n' }}"
    return text_of + find_last + _loop(body, _CHATML_PROMPT + prompt)


def _gemma3() -> str:
    """Trimmed texts; a system turn becomes the first paragraph of the first question; roles take turns."""
    system = (
        "{% set told = namespace(text='') %}"
        "{% if messages[0].role == 'system' %}"
        r"{% set told.text = messages[0].content[0].text + '\n\n' %}{% endif %}"
    )
    order = (
        "{% if (turn.role == 'assistant') != (loop.index0 % 2 == 1) %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}"
    )
    name = "{{ 'model' if turn.role == 'assistant' else turn.role }}"
    header = "{{ '<start_of_turn>' }}" + name + r"{{ '\n' }}{% if loop.first %}{{ told.text }}{% endif %}"
    parts = _parts("{{ part.text | trim }}", image="<start_of_image>")
    body = order + header + parts + r"{{ '<end_of_turn>\n' }}"
    turns = _loop(body, r"<start_of_turn>model\n").replace(
        "for turn in messages ", "for turn in (messages[1:] if told.text else messages) "
    )
    return "{{ bos_token }}" + system + turns


_DEFAULT_SYSTEM: Final = (
    "{% if loop.first and turn.role != 'system' %}"
    r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
_HUB_HEADER: Final = "{{ '<|im_start|>' + turn.role + ' ' }}"
_PLAIN_HEADER: Final = "{{ '<|im_start|>' + turn.role }}"

TEMPLATES: Final[dict[str, str]] = {
    "llava15": _llava15(),
    "llava15_marked": _llava15(answer=_marked("{{ part.text + ' ' }}")),
    "llava15_eos": _llava15(answer="{{ part.text + eos_token + ' ' }}"),
    "onevision_hub": _onevision(_HUB_HEADER),
    "onevision_hub_marked": _onevision(_HUB_HEADER, _marked(r"{{ '\n' + part.text }}")),
    "onevision": _onevision(_PLAIN_HEADER),
    "qwen2_5_vl": _chatml(_VISION, first=_DEFAULT_SYSTEM),
    "qwen3_vl": _chatml(_VISION),
    "qwen3_5_think": _qwen3_5(r"<think>\n"),
    "qwen3_5_nothink": _qwen3_5(r"<think>\n\n</think>\n\n"),
    "gemma3": _gemma3(),
    "internvl": _chatml(r"{{ '<IMG_CONTEXT>\n' }}"),
    "chatml_no_end": _chatml("<image>", end=r"{{ '\n' }}"),
}
"""Shapes in which every answer is verbatim."""

CHANGING: Final[dict[str, str]] = {
    "strip": _chatml("<image>", text="{{ part.text | trim }}"),
    "title": _chatml("<image>", text="{{ part.text | title }}"),
}
"""Templates that do not write what the data says."""

IMAGE_MARKS: Final = {
    name: "<start_of_image>"
    if name == "gemma3"
    else "<IMG_CONTEXT>"
    if name == "internvl"
    else _VISION
    if name.startswith("qwen")
    else "<image>"
    for name in (*TEMPLATES, *CHANGING)
}
"""What each writes for an image, white space aside."""

_CHATML_TOKENS: Final = ("<|im_start|>", "<|im_end|>")
SPECIALS: Final[dict[str, tuple[str, ...]]] = {
    name: ()
    if name.startswith("llava15")
    else ("<start_of_turn>", "<end_of_turn>")
    if name == "gemma3"
    else _CHATML_TOKENS
    for name in (*TEMPLATES, *CHANGING)
}
"""Special tokens that each writes, image marks and the tokenizer's own end of text aside."""


def fit(name: str, mark: str) -> str:
    """A template with another mark for an image, such as another family's image token."""
    return (TEMPLATES | CHANGING)[name].replace(IMAGE_MARKS[name], mark)


HEADERS: Final[dict[str, str]] = {
    name: "ASSISTANT:"
    if name.startswith("llava15")
    else "<|im_start|>assistant \n"
    if name.startswith("onevision_hub")
    else "<start_of_turn>model\n"
    if name == "gemma3"
    else "<|im_start|>assistant\n"
    for name in TEMPLATES
}
"""What precedes an answer and is not part of it; a think block that the template adds comes behind."""

THINK_BLOCK: Final = "<think>\n\n</think>\n\n"


def add_special_tokens(processor: Any) -> None:
    """Teach a tokenizer the special tokens of all templates, none of them as a named one, and a `<bos>`."""
    from tokenizers import AddedToken

    wanted = [token for each in SPECIALS.values() for token in each]
    processor.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
    processor.tokenizer.add_special_tokens({"bos_token": "<bos>"})


def end_of_turn(name: str, eos_token: str) -> str:
    """The token that ends an answer."""
    return SPECIALS[name][1] if SPECIALS[name] and name != "chatml_no_end" else eos_token
