"""`cascache check`: the answer for every field, in words, as JSON and as an exit code."""

import json
import shutil

import pytest

from common.cache import cli
from common.cache.writer import CacheWriter
from common.compat import check_fit
from common.errors import ConfigError
from common.fingerprint import fingerprints
from common.models import TINY, resolve_model
from common.processor import load_processor, read_vocab_rows
from tests.common.cache.records import make_manifest

FIELDS = ["tokenizer", "chat template", "image processor", "vocabulary", "head"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The manifest of a cache of tiny-l2, which is all that `check` reads."""
    teacher = resolve_model("tiny").path_or_id
    processor = load_processor(teacher)
    manifest = make_manifest(
        vocab_rows=read_vocab_rows(teacher), vocab_size=440, fingerprints=fingerprints(processor)
    )
    path = tmp_path_factory.mktemp("compat") / "l1"
    CacheWriter.open(str(path), manifest)
    return path


@pytest.fixture
def student(tmp_path):
    return shutil.copytree(TINY / "tiny-student", tmp_path / "renamed")


def check(cache, student, capsys, *flags):
    code = cli.main(["check", str(cache), "--student", str(student), "--json", *flags])
    answer = json.loads(capsys.readouterr().out)
    assert [each["field"] for each in answer["fields"]] == FIELDS
    assert code == int(not answer["fits"])
    return code, {each["field"]: each for each in answer["fields"]}


def edit(path, change):
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


def test_presets_and_the_same_under_another_name_fit(cache, student, capsys):
    for name in ("tiny", "tiny-student", student):
        code, fields = check(cache, name, capsys)
        assert code == 0
        assert {each["verdict"] for each in fields.values()} == {"fits"}


def test_padded_heads_fit_with_a_note(cache, student, capsys):
    edit(student / "config.json", lambda c: c["text_config"].update(vocab_size=512))
    code, fields = check(cache, student, capsys)
    assert code == 0
    assert fields["head"]["verdict"] == "fits with a note"
    assert "padded differently" in fields["head"]["note"]


CHANGES = {
    "chat template": lambda d: (d / "chat_template.jinja").write_text(
        (d / "chat_template.jinja").read_text("utf-8").replace("| upper", "| lower"), "utf-8"
    ),
    "tokenizer": lambda d: edit(d / "tokenizer.json", swap_ids),
    "image processor": lambda d: edit(
        d / "processor_config.json", lambda c: c["image_processor"].update(size={"height": 64, "width": 64})
    ),
    "vocabulary": lambda d: edit(d / "config.json", lambda c: c["text_config"].update(vocab_size=400)),
}


def swap_ids(table):
    vocabulary = table["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]


@pytest.mark.parametrize("field", CHANGES)
def test_what_differs_is_named_with_what_to_do(cache, student, capsys, field):
    CHANGES[field](student)
    code, fields = check(cache, student, capsys)
    assert code == 1
    assert [name for name, each in fields.items() if each["verdict"] == "does not fit"] == [field]
    assert fields[field]["note"]
    assert cli.main(["check", str(cache), "--student", str(student)]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_special_tokens_are_part_of_the_tokenizer(cache, student, capsys):
    edit(student / "tokenizer_config.json", lambda c: c.update(eos_token="<pad>"))
    code, fields = check(cache, student, capsys)
    assert (code, fields["tokenizer"]["verdict"]) == (1, "does not fit")


def test_an_own_grid_is_a_note(cache, student, capsys):
    CHANGES["image processor"](student)
    code, fields = check(cache, student, capsys, "--image-grid", "own")
    assert (code, fields["image processor"]["verdict"]) == (0, "fits with a note")


def test_no_cache_or_no_model_is_exit_code_2(cache, tmp_path, capsys):
    assert cli.main(["check", str(tmp_path), "--student", "tiny"]) == 2
    assert cli.main(["check", str(cache), "--student", "no-such-model"]) == 2
    assert "presets are" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no model configuration"):
        read_vocab_rows(str(tmp_path))


def test_problems_and_notes_are_those_of_the_fields(cache):
    processor = load_processor(resolve_model("tiny-student").path_or_id)
    fit = check_fit(make_manifest(), processor, vocab_rows=512)
    assert len(fit.problems) == 3
    assert [each.name for each in fit.fields] == FIELDS
