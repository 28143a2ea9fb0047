"""The whole job on small models, on a CPU: render, dump two levels, train, compare.

    render 1,000 images, 30 % of the labels wrong       build/data/
    teacher-dump --model tiny-l1   real vLLM            zarr/l1
    teacher-dump --model tiny-l2   real vLLM            zarr/l2
    student-train  dpt sft dft on l1, dft on l2         runs/demo-cascade     ┐ side by side,
    student-train  pt sft; pt sft sft (same steps)      runs/demo-pt-sft…     ┘ one core each
    table and page                                      build/demo/index.html

Every step is one of the commands a user types. A second run finds what is done and goes on. With another
--seed everything goes to build/demo-seed-N instead.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.data.shapes import materialise
from scripts.demo_page import Arm, write_gallery, write_page

NOISE = 0.3
TEACHERS = ("tiny-l1", "tiny-l2")


def main() -> int:
    """Run the demo; returns its exit status."""
    parser = argparse.ArgumentParser(prog="demo", description="The whole job on small models, on a CPU.")
    parser.add_argument("--seed", type=int, default=0, help="names the images and the order of training")
    parser.add_argument("--images", type=int, default=1000, help="training images")
    arguments = parser.parse_args()
    root = Path() if arguments.seed == 0 else Path(f"build/demo-seed-{arguments.seed}")
    demo = Demo(root, images=arguments.images, seed=arguments.seed)
    with demo.phase("render images"):
        demo.render()
    for model, cache in demo.levels:
        with demo.phase(f"teacher-dump {model} → {cache}"):
            demo.dump(model, cache)
    with demo.phase("student-train, three runs"):
        demo.train()
    with demo.phase("questions for the page"):
        demo.ask()
    print(demo.report())
    return 0


class Demo:
    """The demo's commands, where they leave things, and how long each phase took."""

    def __init__(self, root: Path, *, images: int, seed: int) -> None:
        """Make the working directory.

        Args:
            root: Where caches, runs and the page go.
            images: Training images.
            seed: Names the images and the order of training.
        """
        directory = root / "build" / "demo"
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.seed = directory, seed
        self.levels = [(model, str(root / "zarr" / f"l{n}")) for n, model in enumerate(TEACHERS, 1)]
        self.data = f"shapes:train={images},held_out=300,seed={seed},noise={NOISE}"
        self._phases = Phases(directory / f"phases-{images}-{seed}.json")
        caches = [word for _, cache in self.levels for word in ("--cache", cache)]
        first = self.levels[0][1]
        matched = "scripts/recipes/pt-sft-sft-matched.toml"
        self.arms = (
            Arm("PT-SFT", root / "runs/demo-pt-sft", ("--cache", first, "--recipe", "pt-sft")),
            Arm("PT-SFT-SFT", root / "runs/demo-pt-sft-sft", ("--cache", first, "--recipe", matched)),
            Arm("cascade l1 → l2", root / "runs/demo-cascade", (*caches, "--recipe", "cascade")),
        )

    def phase(self, name: str) -> "Phase":
        """Time a phase, with a headline."""
        return Phase(self._phases, name)

    def render(self) -> None:
        """Write the images and their LLaVA JSON."""
        self.train_json = materialise(self.data)
        self.held_out_json = materialise(f"{self.data},split=held_out")

    def dump(self, model: str, cache: str) -> None:
        """Dump a level."""
        _run("teacher_dump", "--model", model, "--topk", "64", "--data", self.data, "--out", cache)

    def train(self) -> None:
        """Train the cascade on one core, the two baselines on the other."""
        *baselines, cascade = self.arms
        lanes: list[list[Arm]] = [[cascade], baselines]
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(self._train_lane, range(len(lanes)), lanes))

    def _train_lane(self, lane: int, arms: Sequence[Arm]) -> None:
        for arm in arms:
            _run(
                "student_train",
                *arm.flags,
                *("--out", str(arm.out), "--seed", str(self.seed), "--eval", str(self.held_out_json)),
                environment={"TQDM_POSITION": str(lane), "OMP_NUM_THREADS": "1"},
                quiet=True,
            )

    def ask(self) -> None:
        """Let every student answer a few questions of the training set, for the page."""
        gallery = write_gallery(self.directory, self.train_json.parent, seed=self.seed, noise=NOISE)
        for arm in self.arms:
            model, out = arm.out / "model", arm.out / "gallery"
            if not (out / "answers.jsonl").exists():
                flags = ("--model", str(model), "--data", str(gallery), "--out", str(out))
                _run("student_train", "eval", *flags, quiet=True)

    def report(self) -> str:
        """Write the page and return the table."""
        return write_page(
            self.directory,
            arms=self.arms,
            caches=[cache for _, cache in self.levels],
            phases=self._phases.seconds,
            machine=_machine(),
            data=self.train_json.parent,
            seed=self.seed,
            noise=NOISE,
        )


class Phases:
    """Seconds of every phase, kept across runs: a phase that finds its work done keeps its first time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        """Note a phase's time unless it was noted before."""
        self.seconds.setdefault(name, round(seconds, 1))
        self._path.write_text(json.dumps(self.seconds, indent=1) + "\n")


class Phase:
    """Times what stands in its `with` block."""

    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        print(f"\n── {self._name}", file=sys.stderr, flush=True)
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._phases.add(self._name, time.perf_counter() - self._began)


def _run(module: str, *flags: str, environment: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run one of our commands; its own message explains a failure."""
    command = [sys.executable, "-m", module, *flags]
    settings: dict[str, Any] = {"env": {**os.environ, **(environment or {})}}
    if quiet:
        settings["stdout"] = subprocess.DEVNULL
    status = subprocess.run(command, check=False, **settings).returncode
    if status != 0:
        raise SystemExit(f"demo: `{module} {' '.join(flags)}` failed with status {status}; see above")


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}"


if __name__ == "__main__":
    raise SystemExit(main())
