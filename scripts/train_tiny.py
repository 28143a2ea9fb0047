"""Train the shipped tiny models on one CPU thread: `python -m scripts.train_tiny`.

    tower         dense patch labels: what and where every patch is        then frozen, shared by all
    tiny-student  text only: captions read as text, and questions on them  others teach it to see
    tiny-l1 / l2  9,000 images, six questions or a caption each            teachers

Seeds are 1,000,000 and above; data sets for students use smaller ones, so no teacher ever saw a
student's or an examiner's image. Accuracy is exact match under greedy decoding: teacher-forced argmax
over the whole answer and its end mark, which is the same thing.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from common.data import scenes
from scripts import tiny_data, tiny_models

SEED = 1_000_000
TOWER_SEED, TEACHER_SEED, TEXT_SEED, EXAM_SEED, TOKENIZER_SEED = range(SEED, SEED + 5)
STAGES = ("tower", "tiny-student", "tiny-l1", "tiny-l2")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    """Optimiser steps."""
    rate: float
    """Peak learning rate."""
    batch: int = 32
    """Rows a step."""


SCHEDULES = {
    "tower": (Schedule(1300, 1.5e-3, batch=64),),
    "tiny-student": (Schedule(1000, 4e-3),),
    "tiny-l1": (Schedule(1500, 3e-3),),
    "tiny-l2": (Schedule(2000, 2.5e-3), Schedule(1000, 2e-3)),
}
"""Run one after the other, optimiser restarted; question types are learnt one by one, so longer helps."""


def rate_at(step: int, schedule: Schedule) -> float:
    """5 % linear warm-up, then cosine to zero."""
    warm = max(1, schedule.steps // 20)
    if step < warm:
        return schedule.rate * (step + 1) / warm
    return schedule.rate * 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, schedule.steps - warm))))


def optimise(
    name: str,
    weights: list[nn.Parameter],
    schedule: Schedule,
    loss_of: Callable[[int, Tensor], Tensor],
    size: int,
) -> None:
    """AdamW over random batches out of `size` rows; `loss_of(step, rows)` gives the loss."""
    optimiser = torch.optim.AdamW(weights, lr=schedule.rate, weight_decay=0.05, betas=(0.9, 0.98))
    random = torch.Generator().manual_seed(SEED)
    bar = tqdm(range(schedule.steps), desc=name, mininterval=2)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, schedule)
        loss = loss_of(step, torch.randint(size, (schedule.batch,), generator=random))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def tower_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """[S, P, 96] what the projector reads: the last hidden states, before the final norm."""
    output = model.model.vision_tower(pixel_values=images, output_hidden_states=True)
    features: Tensor = output.hidden_states[-1]
    return features


def train_tower(
    model: LlavaForConditionalGeneration, schedule: Schedule, num_images: int
) -> dict[str, float]:
    """Train the tower in place; returns held-out accuracy per target on patches that hold something."""
    drawn = tiny_data.make_scenes(TOWER_SEED, num_images)
    images, labels = tiny_data.pixels(drawn), tiny_data.patch_labels(drawn)
    held_out = num_images // 20
    head = nn.Sequential(
        nn.LayerNorm(tiny_models.TOWER_WIDTH),
        nn.Linear(tiny_models.TOWER_WIDTH, sum(tiny_data.PATCH_TARGETS)),
    )

    def logits_of(rows: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = head(tower_features(model, images[rows]))
        return torch.split(out, list(tiny_data.PATCH_TARGETS), -1)

    def loss_of(_: int, rows: Tensor) -> Tensor:
        wanted = labels[rows]
        losses = [
            F.cross_entropy(logits.flatten(0, 1), wanted[..., target].flatten())
            * (0.5 if target > 2 else 1.0)
            for target, logits in enumerate(logits_of(rows))
        ]
        return torch.stack(losses).sum()

    weights = [*model.model.vision_tower.parameters(), *head.parameters()]
    optimise("tower", weights, schedule, loss_of, num_images - held_out)
    rows = torch.arange(num_images - held_out, num_images)
    with torch.no_grad():
        right = torch.stack([z.argmax(-1) for z in logits_of(rows)], -1) == labels[rows]
    seen = labels[rows][..., 0] > 0
    names = ("shape", "colour", "digit", "row", "column")
    return {name: float(right[..., i][seen].float().mean()) for i, name in enumerate(names)}


def hidden_states(model: LlavaForConditionalGeneration, ids: Tensor, features: Tensor | None) -> Tensor:
    """[B, T, D] final hidden states, from the frozen tower's features instead of pixels."""
    embeddings = model.model.language_model.embed_tokens(ids)
    if features is not None:
        visual = model.model.multi_modal_projector(features)
        is_image = (ids == model.config.image_token_id)[..., None]
        embeddings = embeddings.masked_scatter(is_image, visual)
    output = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def answer_loss(
    model: LlavaForConditionalGeneration, batch: tiny_data.Conversations, features: Tensor | None
) -> Tensor:
    """Mean cross-entropy in nats over labelled tokens; the head runs only there."""
    wanted = batch.labels[:, 1:]
    rows = wanted != tiny_data.IGNORED
    hidden = hidden_states(model, batch.ids, features)[:, :-1][rows]
    return F.cross_entropy(model.lm_head(hidden), wanted[rows])


def train_text(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, num: int
) -> None:
    """Teach the text model the language: captions where the image would stand, then questions."""
    drawn = tiny_data.make_scenes(TEXT_SEED, num)
    texts = [
        tiny_data.render(tiny_data.question_pairs(scene), opening=scenes.caption(scene) + "\n")
        for scene in drawn
    ]
    learnt = tiny_data.tokenise(tokenizer, texts, all_text=True)
    weights = list(model.model.language_model.parameters())
    optimise("text", weights, schedule, lambda _, rows: answer_loss(model, learnt.at(rows), None), num)


def train_teacher(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, num: int
) -> None:
    """Train projector and text model on images; every fifth batch captions."""
    model.model.vision_tower.requires_grad_(False)
    drawn = tiny_data.make_scenes(TEACHER_SEED, num)
    features = all_features(model, drawn)
    asked = tiny_data.tokenise(tokenizer, [tiny_data.render(tiny_data.question_pairs(s)) for s in drawn])
    captioned = tiny_data.tokenise(tokenizer, [tiny_data.render(tiny_data.caption_pairs(s)) for s in drawn])

    def loss_of(step: int, rows: Tensor) -> Tensor:
        batch = (captioned if step % 5 == 4 else asked).at(rows)
        return answer_loss(model, batch, features[rows].float())

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimise("teacher", weights, schedule, loss_of, num)


@torch.no_grad()
def all_features(model: LlavaForConditionalGeneration, drawn: list[scenes.Scene]) -> Tensor:
    """[S, P, 96] frozen features of all scenes, as float16 to save memory."""
    chunks: Iterator[Tensor] = iter(torch.split(tiny_data.pixels(drawn), 256))
    return torch.cat(
        [tower_features(model, chunk).half() for chunk in tqdm(chunks, desc="features", leave=False)]
    )


@torch.no_grad()
def examine(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, num_images: int
) -> dict[str, float]:
    """Exact-match accuracy per question kind on unseen images, four single questions each, and `macro`."""
    drawn = tiny_data.make_scenes(EXAM_SEED, num_images)
    asked = [(i, question) for i, scene in enumerate(drawn) for question in scenes.questions(scene, 4)]
    texts = [tiny_data.render([(question.text, question.answer)]) for _, question in asked]
    exam = tiny_data.tokenise(tokenizer, texts)
    features = all_features(model, drawn)[[i for i, _ in asked]]
    right: dict[str, list[bool]] = {kind: [] for kind in scenes.QUESTION_KINDS}
    for rows in tqdm(torch.split(torch.arange(len(asked)), 256), desc="exam", leave=False):
        batch = exam.at(rows)
        guessed = model.lm_head(hidden_states(model, batch.ids, features[rows].float())[:, :-1]).argmax(-1)
        wanted = batch.labels[:, 1:]
        answered = ((guessed == wanted) | (wanted == tiny_data.IGNORED)).all(1)
        for row, correct in zip(rows.tolist(), answered.tolist(), strict=True):
            right[asked[row][1].kind].append(correct)
    scores = {kind: float(np.mean(marks)) for kind, marks in right.items()}
    return {"macro": float(np.mean(list(scores.values()))), **scores}


@functools.cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer every tiny model uses, trained on 2,000 scenes' text."""
    drawn = tiny_data.make_scenes(TOKENIZER_SEED, 2000)
    pairs = [
        pairs
        for scene in drawn
        for pairs in (tiny_data.question_pairs(scene), tiny_data.caption_pairs(scene))
    ]
    return tiny_models.train_tokenizer(
        ["".join(text for text, _ in tiny_data.render(pair)) for pair in pairs]
    )


def scaled(name: str, scale: float) -> list[Schedule]:
    """The stage's schedules, shortened."""
    return [replace(schedule, steps=max(2, round(schedule.steps * scale))) for schedule in SCHEDULES[name]]


def run_stage(name: str, *, out: Path, work: Path, scale: float) -> dict[str, float]:
    """Run one stage; later stages read the tower that `tower` left in `work`. Returns its scores."""
    num = max(64, round(9000 * min(1.0, scale)))
    tokenizer = shared_tokenizer()
    size = tiny_models.SIZES.get(name, tiny_models.SIZES["tiny-student"])
    model = tiny_models.make_model(size, tokenizer, seed=SEED)
    tower = model.model.vision_tower
    if name == "tower":
        (schedule,) = scaled(name, scale)
        scores = train_tower(model, schedule, num)
        tiny_models.round_weights(tower)
        torch.save(tower.state_dict(), work / "tower.pt")
        return scores
    tower.load_state_dict(torch.load(work / "tower.pt", weights_only=True))
    train = train_text if name == "tiny-student" else train_teacher
    for schedule in scaled(name, scale):
        train(model, tokenizer, schedule, num)
        tiny_models.round_weights(model)
    tiny_models.save_model(model, tiny_models.make_processor(tokenizer), out / name)
    return examine(model, tokenizer, max(32, round(1200 * min(1.0, scale))))


def accuracy_table(directory: Path, num_images: int = 1200) -> str:
    """Accuracy of the stored models on the examination images, as a Markdown table."""
    rows = []
    for name in tiny_models.SIZES:
        model = LlavaForConditionalGeneration.from_pretrained(directory / name).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / name)
        scores = examine(model, tokenizer, num_images)
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        cells = [f"`{name}`", f"{millions:.2f}", *(f"{score:.3f}" for score in scores.values())]
        rows.append("| " + " | ".join(cells) + " |")
    columns = ["model", "M parameters", "macro", *scenes.QUESTION_KINDS]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows])


def main() -> None:
    """Train the named stages, all by default, and print each one's scores."""
    parser = argparse.ArgumentParser(description="Train the shipped tiny models.")
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path("common/tiny"), help="where model directories go")
    parser.add_argument(
        "--work", type=Path, default=Path("build/tiny"), help="where the tower and the scores go"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps and images, for a quick try")
    parser.add_argument(
        "--examine", action="store_true", help="print the table of accuracies of --out and stop"
    )
    arguments = parser.parse_args()
    if arguments.examine:
        print(accuracy_table(arguments.out))
        return
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {sorted(unknown)}; known: {', '.join(STAGES)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages or STAGES:
        scores = run_stage(name, out=arguments.out, work=arguments.work, scale=arguments.scale)
        rounded = {key: round(value, 3) for key, value in scores.items()}
        (arguments.work / f"{name}.json").write_text(json.dumps(rounded, indent=1))
        print(name, json.dumps(rounded))


if __name__ == "__main__":
    main()
