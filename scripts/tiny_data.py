"""Tensors for training the shipped models: pictures, patch labels, tokenised conversations.

Axes: S scenes, T tokens, P patches.

Conversations are cut only where the tokenizer cuts too (before ` ASSISTANT` answers and ` USER`), so
the ids equal those of the whole rendered text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.data import scenes
from common.data.scenes import Scene
from scripts.tiny_models import NUM_PATCHES, PATCH

IGNORED = -100
CAPTION_PROMPT = "describe the image ."
IMAGE_MARK = "<image>\n"
PATCH_TARGETS = (7, 7, 11, 3, 3)
"""Classes of a patch: shape (or none, or digit), colour, digit, cell row, cell column."""


def make_scenes(seed: int, count: int) -> list[Scene]:
    """The first `count` scenes of a set."""
    return [scenes.scene_at(seed, index) for index in range(count)]


def pixels(drawn: list[Scene]) -> Tensor:
    """[S, 3, 48, 48] float32 in [−1, 1], as the image processor makes them."""
    pictures = np.stack([scenes.draw(scene) for scene in tqdm(drawn, desc="draw", leave=False)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


def patch_labels(drawn: list[Scene]) -> Tensor:
    """[S, P, 5] int64 classes of each patch, in the order of `PATCH_TARGETS`."""
    cells = np.zeros((len(drawn), 9, 5), np.int64)
    cells[:, :, 3], cells[:, :, 4] = np.arange(9) // 3, np.arange(9) % 3
    colours = list(scenes.COLOURS)
    for row, scene in zip(cells, drawn, strict=True):
        for thing in scene.things:
            row[thing.cell, :2] = 1 + scenes.SHAPES.index(thing.shape), 1 + colours.index(thing.colour)
        if scene.digit is not None:
            row[scene.digit[1], 0], row[scene.digit[1], 2] = 6, 1 + scene.digit[0]
    side = scenes.SIZE // PATCH
    per_cell = scenes.CELL // PATCH
    cell_of = [row // per_cell * 3 + column // per_cell for row in range(side) for column in range(side)]
    return torch.from_numpy(cells[:, cell_of])


@dataclass(frozen=True)
class Conversations:
    """Tokenised conversations, right-padded."""

    ids: Tensor
    """[S, T] int64."""
    labels: Tensor
    """[S, T] int64; `IGNORED` outside responses."""

    def at(self, rows: Tensor) -> "Conversations":
        """The conversations of these rows, cut to the longest of them."""
        ids, labels = self.ids[rows], self.labels[rows]
        longest = int((ids != 0).sum(1).max())
        return Conversations(ids[:, :longest], labels[:, :longest])


Pairs = list[tuple[str, str]]


def question_pairs(scene: Scene, count: int = 6) -> Pairs:
    """Questions and answers about a scene."""
    return [(question.text, question.answer) for question in scenes.questions(scene, count)]


def caption_pairs(scene: Scene) -> Pairs:
    """The caption as one exchange."""
    return [(CAPTION_PROMPT, scenes.caption(scene))]


def render(pairs: Pairs, *, opening: str = IMAGE_MARK) -> list[tuple[str, bool]]:
    """Pieces of the chat template's text, each with whether it is a response."""
    pieces = []
    for index, (question, answer) in enumerate(pairs):
        start = f"<s> USER: {opening}" if index == 0 else " USER: "
        pieces += [(f"{start}{question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return pieces


def tokenise(
    tokenizer: PreTrainedTokenizerFast, conversations: list[list[tuple[str, bool]]], *, all_text: bool = False
) -> Conversations:
    """Ids and labels of rendered conversations, image marks expanded.

    Args:
        tokenizer: The shared tokenizer.
        conversations: What `render` gave.
        all_text: Learn every token, not only the responses.
    """
    known: dict[str, list[int]] = {}
    image = tokenizer.convert_tokens_to_ids("<image>")
    rows: list[tuple[list[int], list[int]]] = []
    for pieces in tqdm(conversations, desc="tokenise", leave=False):
        ids: list[int] = []
        labels: list[int] = []
        for text, is_response in pieces:
            if text not in known:
                plain = tokenizer(text, add_special_tokens=False).input_ids
                known[text] = [i for token in plain for i in [token] * (NUM_PATCHES if token == image else 1)]
            ids += known[text]
            labels += known[text] if is_response or all_text else [IGNORED] * len(known[text])
        rows.append((ids, labels))
    longest = max(len(ids) for ids, _ in rows)
    return Conversations(
        torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    )
