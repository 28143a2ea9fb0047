"""What proving costs when a cache is given or taken, and what streaming costs a training step.

    push_over_copy, pull_over_copy   `cascache push/pull` ÷ plain copying of the same files, loopback S3, same
                                     library (obstore), same number of threads; medians of paired rounds
    data_wait_share                  of `student-train` steps: cache on disk, streamed cold, streamed again

Plain copying neither hashes nor syncs nor seals. What `scripts.fuzz_cache` counted stands beside it.

    python -m scripts.bench_share          # build/bench/share.json, about two minutes
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import obstore

from common.cache.transfer import JOBS, transfer
from common.cache.writer import CacheWriter
from common.record import Record
from scripts import bench_student_data
from scripts.bench_cache_data import level_of, records_of
from scripts.bench_student import measure_wait
from scripts.loopback_s3 import serve_bucket_apart, use
from scripts.simulated_vlm import simulated
from student_train.config import TrainConfig

IMAGE_BYTES: Final = 400_000
"""An encoded photo."""

FUZZ_KEYS: Final = ("mutations", "crashes", "accepted_wrong", "max_rss_mb")

BARS: Final = {"pull_over_copy": 1.15}


def make_cache(path: Path, *, parts: int, samples: int) -> int:
    """A self-contained cache of a simulated teacher; returns its bytes."""
    known, rng = records_of(simulated(samples)), np.random.default_rng(0)
    level = level_of(known, part_samples=samples).model_copy(update={"with_images": True})
    planned = level.samples.model_copy(update={"num_samples": parts * samples})
    writer = CacheWriter.open(str(path), level.model_copy(update={"samples": planned}))
    for part in range(parts):
        records = [_with_file(record, part, rng) for record in known]
        writer.write_part(part, records, first_sample=part * samples, num_samples=samples)
    writer.finalize()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _with_file(record: Record, part: int, rng: np.random.Generator) -> Record:
    visual = []
    for image in record.visual:
        data = rng.bytes(IMAGE_BYTES)
        sha256 = hashlib.sha256(data).hexdigest()
        visual.append(dataclasses.replace(image, key=sha256[:32], image_sha256=sha256, encoded=data))
    return dataclasses.replace(record, sample_id=f"{part}-{record.sample_id}", visual=tuple(visual))


def copy_up(source: Path, url: str, *, jobs: int) -> None:
    """Plain copying to a bucket."""
    store = obstore.store.from_url(url)
    files = [path for path in source.rglob("*") if path.is_file()]

    def put(path: Path) -> None:
        obstore.put(store, path.relative_to(source).as_posix(), path)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(put, files))


def copy_down(url: str, target: Path, *, jobs: int) -> None:
    """Plain copying from a bucket."""
    store = obstore.store.from_url(url)

    def get(key: str) -> None:
        path = target / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(obstore.get(store, key).bytes()))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(get, [str(item["path"]) for page in obstore.list(store) for item in page]))


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes, what was written before already on the disk."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_transfer(work: Path, *, rounds: int, parts: int, samples: int, jobs: int) -> dict[str, Any]:
    """Rounds of plain copying and of push and pull, one after the other, on the same files."""
    source = work / "given"
    num_bytes = make_cache(source, parts=parts, samples=samples)
    taken: dict[str, list[float]] = {"copy_up": [], "push": [], "copy_down": [], "pull": []}
    for number in range(rounds):
        plain, pushed = f"s3://caches/plain{number}", f"s3://caches/pushed{number}"
        down, pulled = work / f"down{number}", work / f"pulled{number}"
        ways: dict[str, Callable[[], object]] = {
            "copy_up": lambda url=plain: copy_up(source, url, jobs=jobs),  # type: ignore[misc]
            "push": lambda url=pushed: transfer([str(source)], url, jobs=jobs),  # type: ignore[misc]
            "copy_down": lambda to=down: copy_down(pushed, to, jobs=jobs),  # type: ignore[misc] # noqa: B023
            "pull": lambda to=pulled: transfer([pushed], str(to), jobs=jobs),  # type: ignore[misc] # noqa: B023
        }
        for name, way in ways.items():
            taken[name].append(seconds_of(way))
        for path in (down, pulled):
            shutil.rmtree(path)
    ratios = {
        f"{ours}_over_copy": statistics.median(a / b for a, b in zip(taken[ours], taken[plain], strict=True))
        for ours, plain in (("push", "copy_up"), ("pull", "copy_down"))
    }
    speeds = {f"{n}_mb_per_second": num_bytes / 1e6 / statistics.median(v) for n, v in taken.items()}
    return ratios | speeds | {"bytes": num_bytes, "jobs": jobs, "rounds": rounds, "seconds": taken}


def bench_streaming(work: Path, *, steps: int) -> dict[str, float]:
    """Waiting for data: from the disk, streamed with an empty local copy, and with the one that left."""
    made = bench_student_data.make(bench_student_data.Bench(vocabulary=8_192), work / "student")
    url = "s3://caches/trained/l1"
    transfer([str(made.cache)], url)

    def wait(cache: str, name: str) -> tuple[float, float]:
        """Share of the time waited, and the median step's seconds."""
        config = TrainConfig(
            cache=(cache,),
            student=str(made.student),
            out=str(work / name),
            max_steps=steps,
            tensorboard=False,
        )
        share = measure_wait(config)["data_wait_share"]
        lines = (work / name / "metrics.jsonl").read_text().splitlines()
        return share, statistics.median(json.loads(line)["step_seconds"] for line in lines[1:])

    with use({"CASCACHE_COPY": str(work / "copy")}):
        local, local_step = wait(str(made.cache), "local")
        streamed, streamed_step = wait(url, "streamed")
        copied, _ = wait(url, "copied")
    return {
        "data_wait_share_local": local,
        "data_wait_share": streamed,
        "data_wait_share_copied": copied,
        "step_seconds_local": local_step,
        "step_seconds_streamed": streamed_step,
    }


def run(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Everything, as a dictionary."""
    work = out.parent / "share"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    sizes = {"rounds": 1, "parts": 1, "samples": 24} if quick else {"rounds": 3, "parts": 4, "samples": 96}
    with serve_bucket_apart() as environment, use(environment | {"CASCACHE_COPY": ""}):
        result = bench_transfer(work, jobs=JOBS, **sizes) | bench_streaming(work, steps=3 if quick else 15)
    fuzz = out.with_name("fuzz.json")
    if fuzz.exists():
        counted = json.loads(fuzz.read_text())
        result |= {name: counted[name] for name in FUZZ_KEYS if name in counted}
    shutil.rmtree(work)
    result["missed"] = [name for name, bar in BARS.items() if result[name] > bar]
    return result | {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    }


def main() -> None:
    """Measure, write, say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/share.json"))
    parser.add_argument("--quick", action="store_true", help="see that it runs; the numbers mean nothing")
    arguments = parser.parse_args()
    result = run(arguments.out, quick=arguments.quick)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
