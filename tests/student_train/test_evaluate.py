import json
import shutil
from pathlib import Path

import pytest

from common.data.open import open_source
from common.errors import ConfigError
from common.models import TINY
from common.processor import load_processor
from student_train.config import EvalConfig
from student_train.evaluate import (
    Answer,
    Team,
    evaluate,
    generate,
    matches,
    read_questions,
    run_evaluation,
    score,
)
from student_train.model import load_student
from tests.student_train.conftest import STUDENT

TEACHER = str(TINY / "tiny-l2")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Red", "red", True),
        (" two  shapes. ", "two shapes", True),
        ("red square", "red", False),
        ("", "red", False),
        ("3.5", "3.5", True),
        ("is it?</think>\n\nRed", "red", True),
        ("is it?</think>\n\nRed", "<think>\nno\n</think>\n\nred", True),
        ("<think>\nred", "red", False),
    ],
)
def test_matches(answer, reference, right):
    assert matches(answer, reference) is right


def test_score_is_the_mean_over_kinds():
    kinds = ["a", "a", "a", "b"]
    rights = [True, True, False, False]
    answers = [Answer("s", kind, "q", "r", "x", right) for kind, right in zip(kinds, rights, strict=True)]
    found = score(answers)
    assert found["kinds"] == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["overall"] == 0.5
    assert found["num_kinds"] == {"a": 3, "b": 1}


def test_every_assistant_turn_is_a_question(shapes):
    source = open_source(str(shapes))
    conversation = next(sample for sample in source if sample.kind == "qa")
    questions = [
        q for q in read_questions(load_processor(STUDENT), source) if q.sample_id == conversation.sample_id
    ]
    answers = [turn.parts[0] for turn in conversation.turns if turn.role == "assistant"]
    assert [question.reference for question in questions] == answers
    assert answers[0] in questions[1].prompt
    assert answers[0] not in questions[0].prompt.split("USER")[-1]
    assert all(question.num_images == 1 for question in questions)


def test_answers_do_not_depend_on_the_batch(held_out):
    source = open_source(str(held_out))
    _, together = evaluate(TEACHER, source, batch_size=100)
    _, alone = evaluate(TEACHER, source, batch_size=1, limit=10)
    assert together[:10] == alone
    assert len(together) == 36


def test_answers_do_not_depend_on_the_models_sampling_settings():
    """Qwen2.5-VL's files hold a penalty, which greedy generation of transformers applies too."""
    model, processor = load_student(STUDENT).model.eval(), load_processor(STUDENT)
    question = "<|im_start|>user\nwhat is red red red?<|im_end|>\n<|im_start|>assistant\n", []
    plain = generate(model, processor, [question], 12)
    model.generation_config.update(repetition_penalty=30.0, do_sample=True, temperature=0.7, top_k=20)
    assert generate(model, processor, [question], 12) == plain


def test_a_trained_teacher_beats_chance(held_out):
    scores, _ = evaluate(TEACHER, open_source(str(held_out)))
    assert scores["overall"] > 0.5


def test_a_team_answers_as_one_process_does(held_out):
    source, lists = open_source(str(held_out)), []
    for rank in range(3):
        evaluate(TEACHER, source, limit=20, team=Team(rank, 3, lambda mine: lists.append(mine) or mine))
    joined = [each for mine in lists for each in mine]
    scores, answers = evaluate(TEACHER, source, limit=20, team=Team(0, 3, lambda _: joined))
    assert (scores, answers) == evaluate(TEACHER, source, limit=20)


def test_a_torn_image_costs_its_own_questions_only(held_out, tmp_path, caplog):
    copy = tmp_path / "data"
    shutil.copytree(held_out.parent, copy)
    source = open_source(str(copy / held_out.name))
    first = source[0]
    (Path(source.image_root) / first.images[0].path).write_bytes(b"no image")
    lost = sum(sample.images[0].path == first.images[0].path for sample in source)
    scores, answers = evaluate(STUDENT, source)
    assert scores["skipped"] == lost
    assert scores["num"] == len(answers) == 36 - lost
    assert f"question of sample {first.sample_id} left out" in caplog.text


def test_the_command_writes_scores_and_answers(held_out, tmp_path):
    config = EvalConfig(model=STUDENT, data=str(held_out), out=str(tmp_path / "eval"), limit=5)
    scores = run_evaluation(config)
    lines = [json.loads(line) for line in (tmp_path / "eval" / "answers.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == scores
    assert len(lines) == scores["num"] == 5
    assert set(lines[0]) == {"sample_id", "kind", "question", "reference", "answer", "right"}


def test_data_without_questions_is_refused(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"id": "a", "messages": [{"role": "assistant", "content": "hello"}]}\n')
    with pytest.raises(ConfigError, match="holds no assistant turn"):
        evaluate(STUDENT, open_source(str(path)))
