"""Every shape of chat template from a real dump to a trained student and its answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.cache.reader import CacheReader
from common.data.open import open_source
from common.processor import ProcessorOptions, load_processor
from common.record import Record
from common.render import render, render_question
from student_train.collate import Example, InputLayout, Wanted, collate
from student_train.config import EvalConfig, TrainConfig
from student_train.evaluate import run_evaluation
from student_train.train import train
from tests import tiny_families
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.template_job import ANSWERS, OWN, templates
from tests.templates import HEADERS, TEMPLATES, add_special_tokens, end_of_turn, fit

TRAINED = ("llava15", "onevision_hub", "qwen2_5_vl", "qwen3_5_think", "gemma3")
RECIPE = """
base = "tiny"
[[levels]]
stages = [{name = "dft", steps = 1, batch_size = 9, learning_rate = 1e-12, kinds = []}]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tiny_dir: Path) -> Path:
    """Where the model, the data and the caches are: a model whose tokenizer knows every template's tokens."""
    place = tiny_dir.with_name("templates")
    shutil.copytree(tiny_families.build("llava_siglip", tiny_dir), place / "model")
    processor = load_processor(str(place / "model"))
    add_special_tokens(processor)
    processor.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def dumped(root: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    case = templates.__name__
    return run_cases("template_job", tiny_dir, tmp_path_factory.mktemp("answers"), [case])(case)


def processor_of(root: Path, name: str) -> Any:
    options = ProcessorOptions(chat_template=str(root / f"{name}.jinja"))
    return load_processor(str(root / "model"), options=options)


def records(path: Path) -> list[Record]:
    with CacheReader(str(path)) as cache:
        return [cache.read_record(name) for name in sorted(cache.sample_ids)]


def responses(processor: Any, record: Record) -> list[str]:
    spans = [span for span in record.spans if span.kind == "response"]
    return [processor.tokenizer.decode(record.token_ids[span.start : span.stop]) for span in spans]


def test_a_template_that_changes_answers_starts_no_engine(dumped: dict[str, Any]):
    status, text = dumped["title"]
    assert status == 2
    assert "turn 1: the chat template changes the answer: found 'A Red Dog.', wanted 'a red dog.'" in text
    assert "title.jinja" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_dump_has_every_answer_with_its_end_of_turn(name: str, dumped: dict[str, Any], root: Path):
    assert dumped["dumped"][name][0] == 0, dumped["dumped"][name][1]
    processor = processor_of(root, name)
    end = end_of_turn(name, processor.tokenizer.eos_token)
    found = records(root / name)
    assert [record.sample_id for record in found] == [f"{t}-{i}" for t in (1, 2, 3) for i in (0, 1, 2)]
    source = open_source(str(root / "train.json"))
    for sample, record in zip(source, found, strict=True):
        turns, images = map(int, record.sample_id.split("-"))
        assert [each.lstrip(" ") for each in responses(processor, record)] == [
            answer + end for answer in ANSWERS[:turns]
        ]
        text = render(processor, sample).text.replace("<image>", "<image>" * 16)
        assert processor.tokenizer.decode(record.token_ids) == text.replace("<bos>", "<bos>", 1)
        assert len(record.visual) == images
        assert HEADERS[name] in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_of_a_batch_have_each_end_of_turn_once(name: str, dumped: dict[str, Any], root: Path):
    processor = processor_of(root, name)
    found = records(root / name)
    layout = InputLayout(
        pad_id=0, image_token_id=processor.image_token_id, token_types=False, vocab_size=1024
    )
    batch = collate([Example(record, None) for record in found], layout, Wanted(terms=("ce", "response_kl")))
    end = processor.tokenizer.convert_tokens_to_ids(end_of_turn(name, processor.tokenizer.eos_token))
    labels = batch.response_labels.tolist()
    assert labels.count(end) == 3 * (1 + 2 + 3)
    width = batch.inputs["input_ids"].shape[1]
    flat = batch.inputs["input_ids"].reshape(-1)
    assert flat[batch.response_rows + 1].tolist() == labels
    ids = batch.inputs["input_ids"].tolist()
    for row, label in zip(batch.response_rows.tolist(), labels, strict=True):
        if label == end:
            following = ids[row // width][row % width + 2 :]
            assert not following or following[0] not in (end, processor.tokenizer.eos_token_id)


def test_twins_go_on_with_each_others_dump_and_others_are_refused(dumped: dict[str, Any]):
    status, text = dumped["twin"]
    assert (status, "0 of 1 parts to do" in text) == (0, True)
    for refused in (dumped["another"], dumped["own twin"]):
        assert refused[0] == 2
        assert "was dumped with other settings" in refused[1]
        assert "chat_template: found" in refused[1]


@pytest.mark.parametrize("name", OWN)
def test_own_answers_follow_the_generation_prompt(name: str, dumped: dict[str, Any], root: Path):
    assert dumped["own"][name][0] == 0, dumped["own"][name][1]
    processor = processor_of(root, name)
    for sample, record in zip(
        open_source(str(root / "train.json")), records(root / f"own-{name}"), strict=True
    ):
        first = next(span for span in record.spans if span.kind == "response")
        asked = processor.tokenizer.decode(record.token_ids[: first.start])
        assert asked == render_question(processor, sample, 1).replace("<image>", "<image>" * 16)


@pytest.mark.parametrize("name", TRAINED)
def test_a_student_that_is_the_teacher_learns_nothing_and_answers_with_the_template(
    name: str, dumped: dict[str, Any], root: Path, tmp_path: Path
):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    config = TrainConfig(
        cache=(str(root / name),),
        student=str(root / "model"),
        chat_template=str(root / f"{name}.jinja"),
        recipe=str(tmp_path / "recipe.toml"),
        out=str(tmp_path / "run"),
        tensorboard=False,
        log_steps=1,
    )
    train(config)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(line["raw/response_kl"]) < 1e-4
    saved = tmp_path / "run" / "model"
    assert load_processor(str(saved)).chat_template == fit(name, "<image>")
    saved_ids = json.loads((saved / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = load_processor(str(saved)).tokenizer
    end = tokenizer.convert_tokens_to_ids(end_of_turn(name, tokenizer.eos_token))
    assert end in (saved_ids if isinstance(saved_ids, list) else [saved_ids])
    out = tmp_path / "answers"
    evaluated = EvalConfig(model=str(saved), data=str(root / "train.json"), out=str(out), max_new_tokens=2)
    scores = run_evaluation(evaluated)
    assert (scores["num"], scores["skipped"]) == (18, 0)
