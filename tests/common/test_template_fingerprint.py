"""The template's fingerprint covers what training text depends on, and nothing else."""

from itertools import combinations
from typing import Any

import pytest

from common.compat import check_fit
from common.fingerprint import fingerprints
from common.models import resolve_model
from common.processor import load_processor
from common.template_fingerprint import chat_template_fingerprint, former_chat_template_fingerprint
from tests.common.cache.records import make_manifest
from tests.templates import CHANGING, TEMPLATES, fit

SAME = {
    frozenset({"llava15", "llava15_marked"}),
    frozenset({"onevision_hub", "onevision_hub_marked"}),
    frozenset({"qwen3_5_think", "qwen3_5_nothink"}),
}
CHATML = fit("internvl", "<image>")


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(resolve_model("tiny").path_or_id)


def of(processor: Any, template: str, *, asked: bool = False) -> str:
    processor.chat_template = template
    return chat_template_fingerprint(processor, asked=asked)


def test_templates_fit_when_their_training_text_is_the_same(processor: Any):
    found = {name: of(processor, fit(name, "<image>")) for name in (*TEMPLATES, *CHANGING)}
    equal = {frozenset(pair) for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]}
    assert equal == SAME


def test_where_the_teacher_answers_itself_the_generation_prompt_counts(processor: Any):
    think, nothink, marked, plain = (
        of(processor, fit(name, "<image>"), asked=True)
        for name in ("qwen3_5_think", "qwen3_5_nothink", "onevision_hub_marked", "onevision_hub")
    )
    assert think != nothink
    assert marked == plain


CHANGES = {
    "one more line break after the last turn": CHATML.replace(
        "{% endfor %}{% if add", "{% endfor %}\n\n{% if add"
    ),
    "a line break between turns": CHATML.replace(
        "{% for turn in messages %}", r"{% for turn in messages %}{{ '\n' if not loop.first }}"
    ),
    "a default system turn": "{% if messages[0].role != 'system' %}{{ 'be good' }}{% endif %}" + CHATML,
    "no empty system turn": CHATML.replace(
        "in messages %}", "in messages if turn.role != 'system' or turn.content[0].text %}"
    ),
    "another role's name": CHATML.replace("turn.role +", "(turn.role | replace('user', 'human')) +"),
    "another system role": CHATML.replace("turn.role +", "(turn.role | replace('system', 'human')) +"),
    "a space behind the role": CHATML.replace(r"turn.role + '\n'", r"turn.role + ' \n'"),
    "no end of turn at the end": CHATML.replace(r"'<|im_end|>\n'", r"'<|im_end|>\n' if not loop.last"),
    "trimmed questions": CHATML.replace(
        "{{ part.text }}", "{{ part.text | trim if turn.role == 'user' else part.text }}"
    ),
    "escaped questions": CHATML.replace("{{ part.text }}", "{{ part.text | e }}"),
    "lower case": CHATML.replace("{{ part.text }}", "{{ part.text | lower }}"),
    "images first": fit("onevision", "<image>"),
    "one image per question": CHATML.replace(
        "{% endfor %}{{ '<|im_end|>", "{{ '<image>' }}{% endfor %}{{ '<|im_end|>"
    ),
    "numbered images": CHATML.replace(r"{{ '<image>\n' }}", r"{{ '%d <image>\n' % loop.index }}"),
    "no thoughts": CHATML.replace("{{ part.text }}", "{{ part.text.split('</think>')[-1] }}"),
    "an answer must not come first": "{{ raise_exception('no') if messages[0].role == 'assistant' }}"
    + CHATML,
    "parts on lines": CHATML.replace("{{ part.text }}", r"{{ part.text }}{{ '\n' if not loop.last }}"),
    "a third turn counts": CHATML.replace(
        "{{ part.text }}", "{{ part.text }}{{ '.' if messages | length > 5 }}"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_training_text_changes_the_fingerprint(change: str, processor: Any):
    assert CHANGES[change] != CHATML
    assert of(processor, CHANGES[change]) != of(processor, CHATML)


def test_what_changes_no_training_text_does_not(processor: Any):
    marks = CHATML.replace("{{ part.text }}", "{% generation %}{{ part.text }}{% endgeneration %}")
    written = CHATML.replace("turn.role", "turn['role']").replace("{% for", "{# a #}{%- for")
    asks = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    assert len({CHATML, marks, written, asks}) == 4
    assert len({of(processor, each) for each in (CHATML, marks, written, asks)}) == 1


def test_a_refused_conversation_is_one_whatever_the_words(processor: Any):
    no = "{% if messages[0].role == 'system' %}{{ raise_exception('NO') }}{% endif %}" + CHATML
    assert of(processor, no) == of(processor, no.replace("'NO'", "'never'"))
    assert of(processor, no) != of(processor, CHATML)


def test_a_cache_with_the_former_fingerprint_still_fits(processor: Any):
    """It is what the template of the shipped models had before generation prompts were left out."""
    shipped = load_processor(resolve_model("tiny").path_or_id)
    former = "ace3ef6878dd32301e505f71da52c87b13c66314a3a08543434732a2e16f86a4"
    assert former_chat_template_fingerprint(shipped) == former
    own = fingerprints(shipped)
    assert own.chat_template != former
    manifest = make_manifest(fingerprints=own.model_copy(update={"chat_template": former}))
    template = next(
        each for each in check_fit(manifest, shipped, vocab_rows=448).fields if "chat" in each.name
    )
    assert template.verdict == "fits"
    shipped.chat_template = shipped.chat_template.replace("| upper", "| lower")
    template = next(
        each for each in check_fit(manifest, shipped, vocab_rows=448).fields if "chat" in each.name
    )
    assert template.verdict == "does not fit"


def test_twins_fit_a_cache_of_the_datas_answers_and_not_one_of_own_answers(processor: Any):
    processor.chat_template = fit("qwen3_5_think", "<image>")
    for responses, verdict in (("data", "fits"), ("teacher", "does not fit")):
        processor.chat_template = fit("qwen3_5_think", "<image>")
        manifest = make_manifest(
            fingerprints=fingerprints(processor, asked=responses == "teacher"),
            capture={"responses": responses},
        )
        processor.chat_template = fit("qwen3_5_nothink", "<image>")
        found = check_fit(manifest, processor, vocab_rows=448)
        assert next(each.verdict for each in found.fields if "chat" in each.name) == verdict
