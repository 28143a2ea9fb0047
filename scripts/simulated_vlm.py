"""Distributions and states like a 7B vision-language teacher's, made without one.

A low-rank softmax model over V = 151,936 tokens (clustered embeddings, Zipf log-unigrams) is driven by a
smooth random field over an image's patches (visual positions: soft) and by noisy token embeddings
(response positions: sharp). Sizes measured on it speak of encodings, not of any model's quality.

    field [g, g] ─ smooth ─> h [P, d] ──┐
    tokens ─ embed + noise ─> h [N, d] ─┴─> logits = h Eᵀ + 0.8 b ─> top-k, logsumexp
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VOCAB = 151_936
WIDTH = 96
CLUSTERS = 3_000


@dataclass(frozen=True, slots=True)
class Simulated:
    """Rows of many samples, one after the other: first a sample's visual rows, then its response rows."""

    token_ids: NDArray[np.int32]
    """[N, K] ids by falling logit."""
    logits: NDArray[np.float32]
    """[N, K] raw logits."""
    logsumexp: NDArray[np.float32]
    """[N] over the whole vocabulary."""
    num_visual: NDArray[np.int64]
    """[S] visual rows of each sample."""
    num_response: NDArray[np.int64]
    """[S] response rows of each sample."""


class SimulatedTeacher:
    """The softmax model.

    Args:
        seed: Seed of the model.
        vocab: Rows of its head.
    """

    def __init__(self, seed: int = 0, *, vocab: int = VOCAB) -> None:
        draw = torch.Generator().manual_seed(seed)
        centres = torch.randn(CLUSTERS, WIDTH, generator=draw)
        popularity = torch.arange(1, CLUSTERS + 1).float() ** -0.6
        cluster = torch.multinomial(popularity, vocab, replacement=True, generator=draw)
        noise = torch.randn(vocab, WIDTH, generator=draw)
        self.embedding = (0.75 * centres[cluster] + 0.66 * noise) / WIDTH**0.5
        rank = torch.arange(vocab).float() * torch.exp(0.5 * torch.randn(vocab, generator=draw)) + 30
        self.log_unigram = -torch.log(rank)
        self.log_unigram -= self.log_unigram.mean()
        self.unigram = torch.softmax(self.log_unigram, 0)

    def states(self, draw: torch.Generator) -> tuple[Tensor, int, int]:
        """Hidden states [P + N, WIDTH] of one sample, P, and N."""
        side = 27 if torch.rand((), generator=draw) < 0.5 else 24
        length = float(torch.exp(4.4 + 0.7 * torch.randn((), generator=draw)))
        num_response = int(min(max(length, 24), 300))
        image = torch.randn(1, WIDTH, generator=draw)
        patches = 0.55 * image + 0.55 * smooth_field(side, WIDTH, 2.0, draw)
        patches = patches + 0.35 * smooth_field(side, WIDTH, 0.7, draw)
        patches = patches + 0.25 * torch.randn(side * side, WIDTH, generator=draw)
        tokens = torch.multinomial(self.unigram, num_response, replacement=True, generator=draw)
        words = 1.25 * self.embedding[tokens] * WIDTH**0.5 + 0.35 * image
        words = words + 0.7 * torch.randn(num_response, WIDTH, generator=draw)
        soft = torch.exp(0.35 * torch.randn(side * side, 1, generator=draw)) * 3.0
        sharp = torch.exp(0.40 * torch.randn(num_response, 1, generator=draw)) * 2.7
        states = torch.cat([patches / patches.std() * soft, words / words.std() * sharp])
        return states, side * side, num_response

    def logits(self, states: Tensor) -> Tensor:
        """Raw logits [N, vocab] of hidden states [N, WIDTH]."""
        logits: Tensor = states @ self.embedding.T + 0.8 * self.log_unigram + 4.0
        return logits


def smooth_field(side: int, channels: int, blur: float, draw: torch.Generator) -> Tensor:
    """Unit-variance Gaussian field [side², channels], smooth over `blur` patches."""
    reach = 8
    field = torch.randn(channels, 1, side + 2 * reach, side + 2 * reach, generator=draw)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).float() / blur) ** 2)
    kernel = kernel / kernel.sum()
    field = torch.nn.functional.conv2d(field, kernel.view(1, 1, 1, -1))
    field = torch.nn.functional.conv2d(field, kernel.view(1, 1, -1, 1))[:, 0]
    return (field / field.std()).reshape(channels, -1).T


def simulate(num_samples: int, *, topk: int = 64, seed: int = 0) -> Simulated:
    """Top-k rows of `num_samples` samples of about 800 positions; some 3 CPU seconds each."""
    teacher, draw = SimulatedTeacher(seed), torch.Generator().manual_seed(seed + 1)
    ids, values, normalisers, visual, response = [], [], [], [], []
    for _ in range(num_samples):
        states, num_visual, num_response = teacher.states(draw)
        for start in range(0, len(states), 256):
            logits = teacher.logits(states[start : start + 256])
            best = logits.topk(topk, 1)
            ids.append(best.indices.int().numpy())
            values.append(best.values.numpy())
            normalisers.append(torch.logsumexp(logits, 1).numpy())
        visual.append(num_visual)
        response.append(num_response)
    rows = (np.concatenate(ids), np.concatenate(values), np.concatenate(normalisers))
    return Simulated(*rows, np.array(visual), np.array(response))


def simulated(
    num_samples: int, *, topk: int = 64, seed: int = 0, cache: Path = Path("build/simulated")
) -> Simulated:
    """As `simulate`, kept in a file for the next call."""
    path = cache / f"vlm-{num_samples}-{topk}-{seed}.npz"
    if not path.exists():
        made = simulate(num_samples, topk=topk, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(made, name) for name in Simulated.__dataclass_fields__}
        np.savez(path.with_suffix(".tmp.npz"), allow_pickle=False, **fields)
        path.with_suffix(".tmp.npz").rename(path)
    with np.load(path) as data:
        return Simulated(**{name: data[name] for name in Simulated.__dataclass_fields__})


def main() -> None:
    """Make and keep a data set."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--topk", type=int, default=64)
    arguments = parser.parse_args()
    made = simulated(arguments.samples, topk=arguments.topk)
    share = made.num_visual.sum() / len(made.token_ids)
    print(f"{len(made.token_ids)} rows of {len(made.num_visual)} samples, {share:.0%} visual")


if __name__ == "__main__":
    main()
