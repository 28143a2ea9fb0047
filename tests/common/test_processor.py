"""`--chat-template FILE`: read in either form, refused early, kept by what is saved."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.models import resolve_model
from common.processor import ProcessorOptions, load_processor
from common.render import check_answers
from common.settings import load_settings
from student_train.config import EvalConfig, TrainConfig
from teacher_dump.config import AuditConfig, DumpConfig
from tests.templates import fit

MODEL = resolve_model("tiny").path_or_id
CHATML = fit("internvl", "<image>")


def load(file: Path) -> object:
    return load_processor(MODEL, options=ProcessorOptions(chat_template=str(file)))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "other.jinja"
    file.write_text(CHATML)
    return file


def test_the_file_replaces_the_models_own(template: Path):
    assert load(template).chat_template == CHATML
    assert load_processor(MODEL).chat_template != CHATML


def test_the_json_of_older_checkpoints_is_read_too(tmp_path: Path):
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps({"chat_template": CHATML}))
    assert load(file).chat_template == CHATML


def test_a_saved_processor_has_the_template(template: Path, tmp_path: Path):
    load(template).save_pretrained(tmp_path / "saved")
    assert load_processor(str(tmp_path / "saved")).chat_template == CHATML


BAD = {
    "missing.jinja": (None, "cannot be read"),
    "latin.jinja": (b"\xff\xfe", "cannot be read"),
    "list.json": (b"[1]", "has no text called chat_template"),
    "torn.json": (b'{"chat_template": ', "has no text called chat_template"),
    "deep.json": (b"[" * 100_000, "has no text called chat_template"),
    "other.json": (b'{"template": "x"}', "has no text called chat_template"),
    "torn.jinja": (b"{% for turn in messages %}\n{{ turn.role }", "is no Jinja template: line 2: "),
    "empty.jinja": (b" \n", "is empty"),
    "blank.jinja": (b"{% for turn in messages %} {% endfor %}", "renders nothing"),
    "raising.jinja": (b"{{ raise_exception('never') }}", "refuses the conversation: never"),
    "unknown.jinja": (b"{% for turn in messages %}{{ turn.text.upper() }}{% endfor %}", "refuses the conv"),
    "strings.jinja": (b"{% for turn in messages %}{{ turn.content }}{% endfor %}", "expects plain strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_refused_by_name(name: str, tmp_path: Path):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--chat-template {tmp_path / name}.*{message}.*; ") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_some_conversations_is_not(template: Path):
    no_text = "{% if messages[0].content | length == 1 %}{{ raise_exception('an image, please') }}{% endif %}"
    template.write_text(no_text + CHATML)
    assert load(template)
    check_answers(load(template), "x")


def test_a_template_that_changes_a_plain_answer_is_refused_before_a_dump(template: Path):
    template.write_text(fit("title", "<image>"))
    with pytest.raises(
        ConfigError,
        match=r"other.jinja, in a test conversation: turn 1: .*found 'A Red Dog.', wanted 'a red dog.'",
    ):
        check_answers(load(template), "other.jinja")


@pytest.mark.parametrize(
    ("config", "section", "flags"),
    [
        (DumpConfig, "teacher-dump", []),
        (AuditConfig, "teacher-dump verify", ["--cache", "x"]),
        (TrainConfig, "student-train", ["--cache", "x", "--student", "tiny"]),
        (EvalConfig, "student-train eval", ["--model", "x", "--data", "y"]),
    ],
)
def test_every_command_takes_it_from_a_flag_or_the_file(config, section, flags, template, tmp_path):
    (tmp_path / "cascache.toml").write_text(f'["{section}"]\nchat-template = "from-file.jinja"\n')
    told = ["--config", str(tmp_path / "cascache.toml"), *flags]
    assert load_settings(config, told, prog=section).chat_template == "from-file.jinja"
    told += ["--chat-template", str(template)]
    assert load_settings(config, told, prog=section).chat_template == str(template)
