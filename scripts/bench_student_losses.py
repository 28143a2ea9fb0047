"""Time and peak memory of the fused loss against the naive one, at a real vocabulary size.

    naive    logits [N, V] -> one log-softmax -> cross-entropy and sparse KL by gathering
    fused    by rows, and by vocabulary
    eager    with --eager: the definition the tests hold the fused loss to

Forward and backward together; medians of interleaved rounds. On a CPU: process time of one thread, peak
resident bytes over the state before the call. On CUDA: events, and the allocator's peak. `gradient_bytes`
is the head's own gradient, which every implementation must return and which is part of its peak.

    python -m scripts.bench_student_losses                     # build/bench/losses.json
    python -m scripts.bench_student_losses --device cuda --dtype bfloat16 --width 3584 --rows 16384
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from student_train.batch import SparseTargets
from student_train.losses import eager, fused
from student_train.losses.rows import Head, RowTargets
from student_train.losses.terms import IGNORE_LABEL, Divergence

Loss = Callable[[Tensor, Head, RowTargets], Tensor]

RESPONSE_SHARE = 0.15


@dataclass(frozen=True)
class Case:
    """One problem: N rows, K kept tokens, V vocabulary, D width."""

    rows: int
    kept: int
    vocabulary: int
    width: int
    trained_head: bool
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """What one implementation did with one case."""

    case: Case
    implementation: str
    seconds: float
    peak_bytes: int
    gradient_bytes: int


def problem(case: Case) -> tuple[Tensor, Head, RowTargets]:
    """Random states, head and targets whose kept mass is about 0.7."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.rows, case.width, generator=g)
    weight = torch.randn(case.vocabulary, case.width, generator=g) * case.width**-0.5
    ids = torch.rand(case.rows, case.kept, generator=g).mul(case.vocabulary).long()
    logprobs = torch.log_softmax(torch.randn(case.rows, case.kept, generator=g), dim=1) - 0.3567
    labels = torch.randint(case.vocabulary, (case.rows,), generator=g)
    labels[int(RESPONSE_SHARE * case.rows) :] = IGNORE_LABEL
    sparse = SparseTargets(*(t.to(case.device) for t in (ids, logprobs, torch.full((case.rows,), -1.204))))
    coef = torch.full((case.rows,), 1 / case.rows, device=case.device)
    head = Head(weight.to(case.device, dtype).requires_grad_(case.trained_head), None, case.vocabulary)
    return (
        hidden.to(case.device, dtype).requires_grad_(),
        head,
        RowTargets(labels.to(case.device), sparse, coef, coef),
    )


def naive(hidden: Tensor, head: Head, targets: RowTargets) -> Tensor:
    """Cross-entropy and sparse KL the way one writes them first, with one log-softmax for both."""
    log_q = F.linear(hidden, head.weight).float().log_softmax(dim=1)
    ce = F.nll_loss(log_q, targets.labels, ignore_index=IGNORE_LABEL, reduction="none")
    q, p = log_q.gather(1, targets.sparse.token_ids), targets.sparse.logprobs
    tail = torch.log1p(-q.exp().sum(dim=1).clamp(max=1 - 1e-6))
    log_tail = targets.sparse.log_tail
    kl = (p.exp() * (p - q)).sum(dim=1) + log_tail.exp() * (log_tail - tail)
    return (targets.ce_coef * ce + targets.kl_coef * kl).sum()


def implementations(case: Case, *, compiled: bool) -> dict[str, Loss]:
    """What is compared, by name."""
    plain = Divergence()
    by_vocabulary = fused.by_vocabulary(case.rows, case.device)
    found: dict[str, Loss] = {
        "naive": naive,
        "eager": lambda h, head, t: eager.head_losses(h, head, t, plain).total,
        "fused": lambda h, head, t: fused.head_losses(h, head, t, plain).total,
        "fused by vocabulary": lambda h, head, t: (
            fused.head_losses(h, head, t, plain, walk=by_vocabulary).total
        ),
    }
    if compiled:
        found["naive, torch.compile"] = torch.compile(naive)
    return found


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def run_once(step: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds and peak bytes of one call."""
    if device == "cpu":
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        start = time.process_time()
        step()
        return time.process_time() - start, max(0, resident_bytes("VmHWM") - before)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    start_event, stop_event = make_event(enable_timing=True), make_event(enable_timing=True)
    start_event.record()
    step()
    stop_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(stop_event) / 1000, torch.cuda.max_memory_allocated() - before


def measure(case: Case, names: list[str], *, repeats: int) -> list[Measured]:
    """Interleave the implementations, `repeats` rounds after one warm-up."""
    hidden, head, targets = problem(case)
    known = implementations(case, compiled=any("compile" in name for name in names))
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names:
            hidden.grad = head.weight.grad = None

            def step(name: str = name) -> None:
                known[name](hidden, head, targets).backward()  # type: ignore[no-untyped-call]

            sample = run_once(step, case.device)
            if turn:
                samples[name].append(sample)
    size = head.weight.numel() * head.weight.element_size() if case.trained_head else 0
    return [
        Measured(
            case,
            name,
            statistics.median(seconds for seconds, _ in taken),
            int(statistics.median(peak for _, peak in taken)),
            size,
        )
        for name, taken in samples.items()
    ]


def growth(base: Case) -> Iterator[Case]:
    """One axis at a time."""
    yield from (replace(base, kept=kept) for kept in (16, 256))
    yield from (replace(base, rows=base.rows // part) for part in (4, 2))
    yield from (replace(base, vocabulary=vocabulary) for vocabulary in (32_000, 76_000))


def ratios(found: list[Measured]) -> dict[str, float]:
    """Fused against naive: how much less memory, how much more time."""
    by_name = {each.implementation: each for each in found}
    slow, fast = by_name["naive"], by_name["fused"]
    rest = [max(1, each.peak_bytes - each.gradient_bytes) for each in (slow, fast)]
    return {
        "loss_memory_ratio": rest[0] / rest[1],
        "loss_memory_ratio_with_gradient": slow.peak_bytes / max(1, fast.peak_bytes),
        "loss_time_ratio": fast.seconds / slow.seconds,
    }


def show(found: list[Measured]) -> None:
    """Print a table."""
    for each in found:
        case = each.case
        head = "trained" if case.trained_head else "frozen"
        print(
            f"N {case.rows:6d}  K {case.kept:4d}  V {case.vocabulary:7d}  D {case.width:5d}  {head:8s}"
            f"{each.implementation:22s}{each.seconds:9.3f} s {each.peak_bytes / 2**20:10.1f} MiB",
            flush=True,
        )


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/losses.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", action="store_true", help="also vary K, N and V one at a time")
    parser.add_argument("--eager", action="store_true", help="also the definition (about 10 GB at N = 2048)")
    parser.add_argument("--compile", action="store_true", help="also the naive loss under torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ["naive", "fused", "fused by vocabulary"]
    names += ["eager"] * args.eager + ["naive, torch.compile"] * args.compile
    report: dict[str, object] = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "threads": args.threads,
    }
    everything: list[Measured] = []
    for trained in (False, True):
        case = Case(args.rows, args.kept, args.vocabulary, args.width, trained, args.dtype, args.device)
        found = measure(case, names, repeats=args.repeats)
        show(found)
        everything += found
        report["trained head" if trained else "frozen head"] = ratios(found)
        for other in growth(case) if args.growth and not trained else ():
            found = measure(other, ["naive", "fused"], repeats=args.repeats)
            show(found)
            everything += found
    report["measured"] = [asdict(each) for each in everything]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps({name: value for name, value in report.items() if name != "measured"}, indent=1))


if __name__ == "__main__":
    main()
