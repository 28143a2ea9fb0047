"""What a teacher's head costs and loses in float16, bfloat16, float32, beside what the codec loses.

    states [N, D], weight [V, D], both bfloat16 ──product in each dtype──> top-k, logsumexp, tail ──> KL
    the float32 ones ──cache──> KL of the codec

Random states and weights, scaled so that the mean of the largest logits is 12, 20 or 40. KL is that of the
float64 product against the kept row, what is not kept as one bucket, in nats, averaged over rows. Time is
that of the product as vLLM computes it on this device (on a CPU the weight is widened on every call), the
median of interleaved rounds.

    python -m scripts.bench_head            # build/bench/head.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.cache.reader import CacheReader
from common.cache.writer import CacheWriter
from common.record import Record, TopK
from common.topk import sparse_rows
from schemas.sample import Span
from scripts.bench_cache import kl_nats
from scripts.bench_cache_data import level_of

VOCAB = 151_936
WIDTH = 1024
ROWS = 128
TOPK = 64
TOPS = (12.0, 20.0, 40.0)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/head.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, WIDTH, generator=generator).to(options.device, torch.bfloat16)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(options.device, torch.bfloat16)
    found: dict[str, Any] = {
        "machine": _machine(options.device),
        "seconds": seconds(states, weight, options.rounds),
        "kl_nats": {f"{top:g}": losses(states, weight, top) for top in TOPS},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def product(states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, V] the head's product as vLLM computes it."""
    if states.is_cuda and dtype == torch.float32:
        return torch.mm(states, weight.T, out_dtype=dtype)
    return functional.linear(states.to(dtype), weight.to(dtype))


def seconds(states: Tensor, weight: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of one product by dtype."""
    taken: dict[str, list[float]] = {name: [] for name in DTYPES}
    for _ in range(rounds + 1):
        for name, dtype in DTYPES.items():
            start = time.perf_counter()
            product(states, weight, dtype)
            if states.is_cuda:
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in taken.items()}  # the first warms up


def losses(states: Tensor, weight: Tensor, top: float) -> dict[str, float]:
    """Mean KL by dtype of the head, and of the codec on the exact rows, at a mean largest logit of `top`."""
    plain = product(states, weight, torch.float32)
    scaled = (weight * (top / plain.max(-1).values.mean())).to(weight.dtype)
    exact = exact_logits(states, scaled)
    kept = {name: kept_rows(product(states, scaled, dtype).float()) for name, dtype in DTYPES.items()}
    truth = kept_rows(exact.float())
    found = {name: mean_kl(exact, rows) for name, rows in kept.items()}
    return found | {"codec": float(kl_nats(truth, through_cache(truth)).mean())}


def exact_logits(states: Tensor, weight: Tensor) -> Tensor:
    """[N, V] float64, a slice of the vocabulary at a time."""
    wide = states.double()
    starts = range(0, len(weight), 16384)
    return torch.cat([wide @ weight[start : start + 16384].double().T for start in starts], -1)


def kept_rows(logits: Tensor) -> TopK:
    """What the capture keeps of [N, V] float32 logits."""
    found = sparse_rows(logits, TOPK)
    arrays = [each.cpu().numpy() for each in found if each is not None]
    return TopK(np.arange(len(logits), dtype=np.int32), *arrays)


def mean_kl(exact: Tensor, rows: TopK) -> float:
    """KL(exact ‖ rows) in nats, over the ids that the rows kept and one bucket."""
    ids = torch.from_numpy(np.array(rows.token_ids, np.int64)).to(exact.device)
    theirs = exact.log_softmax(-1)
    rest = theirs.scatter(-1, ids, float("-inf")).logsumexp(-1)
    kept = theirs.gather(-1, ids)
    ours = torch.from_numpy(rows.logprobs).to(kept)
    tail = torch.from_numpy(rows.log_tail[:, 0]).to(kept)
    return float(((kept.exp() * (kept - ours)).sum(-1) + rest.exp() * (rest - tail)).mean())


def through_cache(rows: TopK) -> TopK:
    """The rows as a cache in the default encoding gives them back."""
    count = len(rows.positions)
    spans = (Span(kind="prompt", start=0, stop=1), Span(kind="response", start=1, stop=count + 1))
    tokens = np.concatenate([[0], rows.token_ids[:, 0]]).astype(np.int32)
    record = Record("rows", None, tokens, spans, rows, ())
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/cache"
        writer = CacheWriter.open(path, level_of([record]))
        writer.write_part(0, [record], first_sample=0, num_samples=1)
        writer.finalize()
        with CacheReader(path) as cache:
            return cache.read_record("rows").response


if __name__ == "__main__":
    main()
