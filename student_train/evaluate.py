"""Answers on held-out data: real generation, exact match by kind of question.

sample ──every assistant turn──> question (turns before it), reference
       ──chat template──> prompt ──generate, greedy, batched by length──> answer
answer = reference (without thoughts, case, outer white space, final full stop)  ──> share right per kind
                                                                           ──> mean over kinds
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from common.data.open import open_source
from common.data.source import SampleSource
from common.errors import ConfigError, DataError
from common.images import read_image
from common.processor import ProcessorOptions, load_processor
from common.render import render_question
from schemas.sample import Sample
from student_train.config import EvalConfig
from student_train.metrics import write_json
from student_train.model import load_student, stop_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Team:
    """Processes that share the questions."""

    rank: int = 0
    """This one."""
    size: int = 1
    """How many there are."""
    gather: Callable[[list[Any]], list[Any]] = list
    """Joins the lists of all of them, in every one of them."""


ALONE: Final = Team()


@dataclass(frozen=True, slots=True)
class Question:
    """One question to a model."""

    sample_id: str
    """The sample it comes from."""
    kind: str
    """Question type; `all` where the data names none."""
    prompt: str
    """The conversation before the answer, under the chat template."""
    question: str
    """Text of the turn that asks."""
    reference: str
    """The right answer."""
    sample: Sample
    """Whose images it shows."""
    num_images: int
    """How many of them stand before the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    sample_id: str
    """The sample."""
    kind: str
    """Question type."""
    question: str
    """What was asked."""
    reference: str
    """The right answer."""
    answer: str
    """The model's."""
    right: bool
    """Whether they match."""


def evaluate(
    model_path: str,
    source: SampleSource,
    *,
    batch_size: int = 100,
    max_new_tokens: int = 32,
    limit: int | None = None,
    device: torch.device | None = None,
    team: Team = ALONE,
    options: ProcessorOptions | None = None,
) -> tuple[dict[str, Any], list[Answer]]:
    """Answer every question of a data set.

    Args:
        model_path: Model directory, as `save_student` writes it.
        source: Held-out samples.
        batch_size: Questions generated together.
        max_new_tokens: Longest answer.
        limit: Only the first so many questions.
        device: Where to compute; a GPU if there is one.
        team: The processes that share the questions.
        options: How the model's processor is set.

    Returns:
        Scores (see `score`), and every answer in the data's order.

    Raises:
        ConfigError: The data holds no question.
    """
    student = load_student(model_path)
    student.eval()
    return answer(
        student.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        load_processor(model_path, options=options),
        source,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
        team=team,
    )


def answer(
    model: Any,
    processor: Any,
    source: SampleSource,
    *,
    batch_size: int = 100,
    max_new_tokens: int = 32,
    limit: int | None = None,
    team: Team = ALONE,
) -> tuple[dict[str, Any], list[Answer]]:
    """Answer every question of a data set with a model in memory; see `evaluate`.

    Samples that cannot be read are left out, named in the log and counted as `skipped`.

    Args:
        model: A generating model in evaluation mode.
        processor: Its processor; nobody else may use it meanwhile.
        source: Held-out samples.
        batch_size: Questions generated together.
        max_new_tokens: Longest answer.
        limit: Only the first so many questions.
        team: The processes that share the questions; each gets all answers.

    Raises:
        ConfigError: The data holds no question that can be read.
    """
    root, hide = source.image_root, True if team.rank else None
    questions = list(islice(read_questions(processor, source), limit))
    if not questions:
        raise ConfigError(
            f"{source.path} holds no assistant turn that can be asked; see the log, or name other data"
        )
    by_length = sorted(
        range(len(questions)), key=lambda row: (questions[row].num_images, len(questions[row].prompt))
    )
    mine = by_length[team.rank :: team.size]
    said: list[tuple[int, str]] = []
    with tqdm(total=len(mine), desc="answering", unit="question", disable=hide) as bar:
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            shown = {row: images for row in rows if (images := _images(questions[row], root)) is not None}
            batch = [(questions[row].prompt, images) for row, images in shown.items()]
            texts = generate(model, processor, batch, max_new_tokens) if batch else []
            said += zip(shown, texts, strict=True)
            bar.update(len(rows))
    answers = [_judge(questions[row], text) for row, text in sorted(team.gather(said))]
    if not answers:
        raise ConfigError(f"no image of {source.path} can be read; see the log, or set --image-root")
    return score(answers) | {"skipped": len(questions) - len(answers)}, answers


def _judge(question: Question, text: str) -> Answer:
    right = matches(text, question.reference)
    return Answer(question.sample_id, question.kind, question.question, question.reference, text, right)


def _images(question: Question, root: str | None) -> list[Any] | None:
    try:
        return [read_image(question.sample.images[n], root) for n in range(question.num_images)]
    except DataError as error:
        log.warning("question of sample %s left out: %s", question.sample_id, error)
        return None


def _readable(source: SampleSource) -> Iterator[Sample]:
    for index, sample_id in enumerate(source.sample_ids()):
        try:
            yield source[index]
        except DataError as error:
            log.warning("sample %s left out: %s", sample_id, error)


def read_questions(processor: Any, source: SampleSource) -> Iterator[Question]:
    """Yield a question for every assistant turn, the turns before it as they stand in the data.

    Args:
        processor: Its chat template renders the prompt.
        source: Held-out samples; those that cannot be read or rendered are left out and named in the log.
    """
    for sample in _readable(source):
        for place, turn in enumerate(sample.turns):
            if turn.role != "assistant" or place == 0:
                continue
            before = sample.turns[:place]
            try:
                prompt = render_question(processor, sample, place)
            except DataError as error:
                log.warning("question of sample %s left out: %s", sample.sample_id, error)
                continue
            yield Question(
                sample_id=sample.sample_id,
                kind=sample.kind or "all",
                prompt=prompt,
                question=_text(before[-1].parts),
                reference=_text(turn.parts),
                sample=sample,
                num_images=sum(isinstance(part, int) for earlier in before for part in earlier.parts),
            )


@torch.no_grad()
def generate(
    model: Any, processor: Any, questions: Sequence[tuple[str, list[Any]]], max_new_tokens: int
) -> list[str]:
    """Answer a batch greedily.

    Args:
        model: A generating model in evaluation mode.
        processor: Its processor.
        questions: Prompts, each with its images.
        max_new_tokens: Longest answer.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    prompts = [prompt for prompt, _ in questions]
    inputs = processor(
        text=prompts,
        images=[image for _, images in questions for image in images] or None,
        return_tensors="pt",
        padding=True,
        add_special_tokens=not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token)),
    ).to(model.device)
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # a model's own settings may set one; the likeliest token is wanted
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=stop_ids(model, processor),
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def matches(answer: str, reference: str) -> bool:
    """Compare two answers; thoughts before `</think>`, case, spacing and a final full stop do not count."""
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    spoken = text.rpartition("</think>")[2]
    return re.sub(r"\s+", " ", spoken).strip().rstrip(".").strip().lower()


def _text(parts: Sequence[str | int]) -> str:
    return "".join(part for part in parts if isinstance(part, str)).strip()


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return shares of right answers.

    Args:
        answers: At least one.

    Returns:
        `accuracy` the mean over kinds, `overall` over answers, `kinds` per kind, `num` and `num_kinds`.
    """
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for each in answers:
        by_kind[each.kind].append(each.right)
    kinds = {kind: sum(right) / len(right) for kind, right in sorted(by_kind.items())}
    return {
        "accuracy": sum(kinds.values()) / len(kinds),
        "overall": sum(each.right for each in answers) / len(answers),
        "kinds": kinds,
        "num": len(answers),
        "num_kinds": {kind: len(by_kind[kind]) for kind in kinds},
    }


def write_results(directory: Path, scores: dict[str, Any], answers: Sequence[Answer]) -> None:
    """Write eval.json and answers.jsonl.

    Args:
        directory: Where to.
        scores: What `score` returned.
        answers: One line each.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in answers)
    (directory / "answers.jsonl").write_text(lines, encoding="utf-8")
    write_json(directory / "eval.json", scores)


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Carry out the `eval` command.

    Raises:
        CascacheError: The model or the data cannot be used.
    """
    from common.models import resolve_model

    source = open_source(config.data, image_root=config.image_root)
    scores, answers = evaluate(
        resolve_model(config.model).path_or_id,
        source,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        limit=config.limit,
        options=config,
    )
    if config.out:
        write_results(Path(config.out), scores, answers)
    return scores
