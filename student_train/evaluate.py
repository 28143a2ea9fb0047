"""Answers on held-out data: real generation, exact match by kind of question.

sample ──every assistant turn──> question (turns before it), reference
       ──chat template──> prompt ──generate, greedy, batched by length──> answer
answer = reference (case, outer white space and a final full stop aside)  ──> share right per kind
                                                                           ──> mean over kinds
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.chat import load_processor, to_messages
from common.data.open import open_source
from common.data.source import SampleSource
from common.errors import ConfigError
from common.images import read_image
from schemas.sample import Sample
from student_train.config import EvalConfig
from student_train.metrics import write_json
from student_train.model import load_student


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
) -> tuple[dict[str, Any], list[Answer]]:
    """Answer every question of a data set.

    Args:
        model_path: Model directory, as `save_student` writes it.
        source: Held-out samples.
        batch_size: Questions generated together.
        max_new_tokens: Longest answer.
        limit: Only the first so many questions.

    Returns:
        Scores (see `score`), and every answer in the data's order.

    Raises:
        ConfigError: The data holds no question.
    """
    student = load_student(model_path)
    student.eval()
    return answer(
        student.model,
        load_processor(model_path),
        source,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
    )


def answer(
    model: Any,
    processor: Any,
    source: SampleSource,
    *,
    batch_size: int = 100,
    max_new_tokens: int = 32,
    limit: int | None = None,
) -> tuple[dict[str, Any], list[Answer]]:
    """Answer every question of a data set with a model in memory; see `evaluate`.

    Args:
        model: A generating model in evaluation mode.
        processor: Its processor; nobody else may use it meanwhile.
        source: Held-out samples.
        batch_size: Questions generated together.
        max_new_tokens: Longest answer.
        limit: Only the first so many questions.

    Raises:
        ConfigError: The data holds no question.
    """
    questions = list(read_questions(processor, source))[:limit]
    if not questions:
        raise ConfigError(f"{source.path} holds no assistant turn to answer; name other data with --eval")
    return _answer_all(model, processor, questions, source.image_root, batch_size, max_new_tokens)


def _answer_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    root: str | None,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[dict[str, Any], list[Answer]]:
    by_length = sorted(
        range(len(questions)), key=lambda row: (questions[row].num_images, len(questions[row].prompt))
    )
    texts = [""] * len(questions)
    with tqdm(total=len(questions), desc="answering", unit="question", disable=None) as bar:
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            batch = [questions[row] for row in rows]
            for row, text in zip(rows, generate(model, processor, batch, root, max_new_tokens), strict=True):
                texts[row] = text
            bar.update(len(rows))
    answers = [
        Answer(each.sample_id, each.kind, each.question, each.reference, text, matches(text, each.reference))
        for each, text in zip(questions, texts, strict=True)
    ]
    return score(answers), answers


def read_questions(processor: Any, source: SampleSource) -> Iterator[Question]:
    """Yield a question for every assistant turn, the turns before it as they stand in the data.

    Args:
        processor: Its chat template renders the prompt.
        source: Held-out samples.
    """
    for sample in source:
        messages = to_messages(sample)
        for place, turn in enumerate(sample.turns):
            if turn.role != "assistant" or place == 0:
                continue
            before = sample.turns[:place]
            yield Question(
                sample_id=sample.sample_id,
                kind=sample.kind or "all",
                prompt=processor.apply_chat_template(
                    messages[:place], tokenize=False, add_generation_prompt=True
                ),
                question=_text(before[-1].parts),
                reference=_text(turn.parts),
                sample=sample,
                num_images=sum(isinstance(part, int) for earlier in before for part in earlier.parts),
            )


@torch.no_grad()
def generate(
    model: Any, processor: Any, questions: Sequence[Question], root: str | None, max_new_tokens: int
) -> list[str]:
    """Answer a batch greedily.

    Args:
        model: A generating model in evaluation mode.
        processor: Its processor.
        questions: What to ask.
        root: Directory that relative image paths start from.
        max_new_tokens: Longest answer.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    images = [read_image(each.sample.images[n], root) for each in questions for n in range(each.num_images)]
    inputs = processor(
        text=[each.prompt for each in questions],
        images=images or None,
        return_tensors="pt",
        padding=True,
        add_special_tokens=not (tokenizer.bos_token and questions[0].prompt.startswith(tokenizer.bos_token)),
    ).to(model.device)
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=_stops(model, tokenizer),
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _stops(model: Any, tokenizer: Any) -> list[int]:
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return sorted({int(each) for each in [*ids, tokenizer.eos_token_id] if each is not None})


def matches(answer: str, reference: str) -> bool:
    """Compare two answers, case, spacing and a final full stop aside."""
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().lower()


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
    )
    if config.out:
        write_results(Path(config.out), scores, answers)
    return scores
