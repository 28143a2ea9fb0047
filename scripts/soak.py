"""Break a cache in every way we know, and count what is lost or silently wrong: it has to be nothing.

    kills         writers and readers of one level die at random moments (SIGKILL), others take over
    corruptions   bit flips, truncations, deletions, swapped and stray files in a finished level
    full disk     a small tmpfs (or a file size limit) fills up, is freed, the dump goes on
    clock jumps   file times and the writers' clock move by years while they work

    python -m scripts.soak [--kills 240] [--corruptions 2400] [--out build/bench/soak.json]

What counts: a record that a sealed part should hold and does not is *lost*; a record that reads without
an error and differs from the truth is *silently wrong*; a corruption is *detected* when `verify` names it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import numpy as np

from common.cache.reader import CacheReader
from common.cache.seals import sealed_parts
from common.cache.verify import repair, verify
from common.cache.writer import CacheWriter
from common.errors import CascacheError
from common.record import Record
from schemas.manifest import Manifest
from scripts.soak_data import NUM_PARTS, PART_SAMPLES, level, part_records, same_record

FORK: Final = multiprocessing.get_context("fork")
NUM_WRITERS: Final = 3
NUM_READERS: Final = 2
YEAR_SECONDS: Final = 365 * 86400.0


def write_level(path: str, number: int, seed: int) -> None:
    """Write whatever parts of a level are not sealed, in an order of one's own."""
    rng = np.random.default_rng([number, seed])
    offset = float(rng.uniform(-5, 5)) * YEAR_SECONDS
    true_time = time.time
    time.time = lambda: true_time() + offset
    cache = CacheWriter.open(path, level(number), block_rows=60)
    for part in rng.permutation(NUM_PARTS).tolist():
        if part not in cache.sealed:
            records = part_records(number, part)
            cache.write_part(part, records, first_sample=part * PART_SAMPLES, num_samples=len(records))
    if len(cache.sealed) == NUM_PARTS:
        with contextlib.suppress(OSError):
            cache.finalize()


def read_level(path: str, number: int, wrong: "multiprocessing.sharedctypes.Synchronized[int]") -> None:
    """Read whatever is sealed, again and again; count what differs from the truth."""
    truth = {r.sample_id: r for part in range(NUM_PARTS) for r in part_records(number, part)}
    while True:
        with contextlib.suppress(CascacheError), CacheReader(path) as cache:
            count_wrong(cache, truth, wrong)


def count_wrong(
    cache: CacheReader, truth: dict[str, Record], wrong: "multiprocessing.sharedctypes.Synchronized[int]"
) -> None:
    """Compare every record that reads without an error."""
    for block in range(cache.num_blocks):
        held = cache.read_block(block)
        for index in range(len(held)):
            record = held.record(index)
            if not same_record(record, truth[record.sample_id]):
                with wrong.get_lock():
                    wrong.value += 1


def soak_kills(work: Path, kills: int, rng: np.random.Generator, counts: Counter[str]) -> None:
    """Levels written by several processes that keep dying."""
    wrong = FORK.Value("q", 0)
    number = 0
    while counts["kills"] < kills:
        path = str(work / f"level-{number}")
        workers: list[BaseProcess] = []
        start = time.monotonic()
        while len(sealed_parts(Path(path))) < NUM_PARTS and time.monotonic() - start < 120:
            workers = [w for w in workers if w.is_alive()]
            while len(workers) < NUM_WRITERS + NUM_READERS:
                workers.append(_spawn(path, number, len(workers), int(rng.integers(2**31)), wrong))
            time.sleep(float(rng.exponential(0.12)))
            victim = workers[int(rng.integers(len(workers)))]
            if counts["kills"] < kills and victim.is_alive() and victim.pid is not None:
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                counts["kills"] += 1
            counts["clock_jumps"] += _jump_file_times(Path(path), rng)
        for worker in workers:
            worker.kill()
            worker.join()
        _settle(path, number, counts)
        shutil.rmtree(path)
        number += 1
    counts["levels"] = number
    counts["silently_wrong"] += wrong.value


def _spawn(
    path: str, number: int, rank: int, seed: int, wrong: "multiprocessing.sharedctypes.Synchronized[int]"
) -> BaseProcess:
    if rank < NUM_WRITERS or not Path(path, "zarr.json").exists():
        worker = FORK.Process(target=write_level, args=(path, number, seed), daemon=True)
    else:
        worker = FORK.Process(target=read_level, args=(path, number, wrong), daemon=True)
    worker.start()
    return worker


def _jump_file_times(path: Path, rng: np.random.Generator) -> int:
    """Set one file's times years away; nothing may depend on them."""
    try:
        files = list(path.glob("parts/*/*/c.0.0"))
    except FileNotFoundError:  # a loser's copy vanished while we looked
        return 0
    if not files:
        return 0
    when = time.time() + float(rng.uniform(-20, 20)) * YEAR_SECONDS
    with contextlib.suppress(OSError):
        os.utime(files[int(rng.integers(len(files)))], (when, when))
    return 1


def _settle(path: str, number: int, counts: Counter[str]) -> None:
    """Clean up after the dead, dump what is missing, and compare everything with the truth."""
    report = verify(path)
    if not report.ok:
        counts["damaged_by_kills"] += 1
    repair(report)
    write_level(path, number, 0)
    counts["lost"] += 0 if verify(path).ok else 1
    counts["silently_wrong"] += compare(path, number, counts)


def compare(path: str, number: int, counts: Counter[str]) -> int:
    """Records that differ; those that are missing are counted as lost."""
    truth = {r.sample_id: r for part in range(NUM_PARTS) for r in part_records(number, part)}
    with CacheReader(path) as cache:
        found = {name: cache.read_record(name) for name in cache.sample_ids}
    counts["lost"] += len(truth.keys() - found.keys())
    counts["records"] += len(found)
    return sum(not same_record(record, truth[name]) for name, record in found.items())


def soak_corruptions(work: Path, trials: int, rng: np.random.Generator, counts: Counter[str]) -> None:
    """Damage one thing at a time in a finished level; it must be seen, and never read as data."""
    path = work / "level"
    write_level(str(path), 0, 0)
    truth = {r.sample_id: r for part in range(NUM_PARTS) for r in part_records(0, part)}
    kinds = list(DAMAGES)
    while counts["corruptions"] < trials:
        files = sorted(p for p in path.rglob("*") if p.is_file())
        kind = kinds[int(rng.integers(len(kinds)))] if rng.random() < 0.4 else "flip"
        backup = {p: p.read_bytes() for p in files}
        if not DAMAGES[kind](files, rng):
            continue
        counts["corruptions"] += 1
        counts[f"corruptions_{kind}"] += 1
        report = verify(str(path))
        seen = (
            not report.ok or bool(report.missing_parts) or any(p.kind == "unsealed" for p in report.problems)
        )
        counts["detected"] += seen
        counts["silently_wrong"] += _wrong_now(path, truth)
        if counts["corruptions"] % 40 == 0:
            counts["recoveries_tried"] += 1
            counts["recovered"] += _recover(path, level(0), truth)
        _restore(path, backup)


def _flip(files: list[Path], rng: np.random.Generator) -> bool:
    path = files[int(rng.integers(len(files)))]
    data = bytearray(path.read_bytes())
    if data:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    return bool(data)


def _truncate(files: list[Path], rng: np.random.Generator) -> bool:
    path = files[int(rng.integers(len(files)))]
    size = path.stat().st_size
    os.truncate(path, int(rng.integers(size)))
    return size > 0


def _delete(files: list[Path], rng: np.random.Generator) -> bool:
    chosen = [p for p in files if "index" not in p.parts]
    chosen[int(rng.integers(len(chosen)))].unlink()
    return True


def _swap(files: list[Path], rng: np.random.Generator) -> bool:
    a, b = (files[i] for i in rng.choice(len(files), 2, replace=False).tolist())
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return bool(first != second)


def _stray(files: list[Path], rng: np.random.Generator) -> bool:
    files[int(rng.integers(len(files)))].with_name("stray.bin").write_bytes(rng.bytes(50))
    return True


def _overwrite(files: list[Path], rng: np.random.Generator) -> bool:
    path = files[int(rng.integers(len(files)))]
    data = path.read_bytes()
    start = int(rng.integers(len(data)))
    noise = rng.bytes(min(64, len(data) - start))
    path.write_bytes(data[:start] + noise + data[start + len(noise) :])
    return bool(path.read_bytes() != data)


DAMAGES: Final = {
    "flip": _flip,
    "truncate": _truncate,
    "delete": _delete,
    "swap": _swap,
    "stray": _stray,
    "overwrite": _overwrite,
}


def _wrong_now(path: Path, truth: dict[str, Record]) -> int:
    try:
        with CacheReader(str(path)) as cache:
            records = [cache.read_record(name) for name in cache.sample_ids]
    except CascacheError:
        return 0
    return sum(r.sample_id not in truth or not same_record(r, truth[r.sample_id]) for r in records)


def _recover(path: Path, manifest: Manifest, truth: dict[str, Record]) -> int:
    """Repair and dump again; 1 when everything is as before. A damaged manifest needs another copy."""
    try:
        repair(verify(str(path)))
        for stray in path.rglob("stray.bin"):
            stray.unlink()
        write_level(str(path), 0, 0)
        with CacheReader(str(path)) as cache:
            whole = {name: cache.read_record(name) for name in cache.sample_ids}
        same = all(same_record(whole[name], record) for name, record in truth.items())
        return int(same and verify(str(path)).ok and manifest == level(0))
    except CascacheError as error:
        return int("restore it from another copy" in str(error) or "not a cache" in str(error))


def _restore(path: Path, backup: dict[Path, bytes]) -> None:
    for file in path.rglob("*"):
        if file.is_file() and file not in backup:
            file.unlink()
    for file, data in backup.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)
    kept = {parent for file in backup for parent in file.parents}
    for directory in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        if directory not in kept:
            directory.rmdir()


@contextlib.contextmanager
def small_disk(work: Path, num_bytes: int) -> Iterator[tuple[Path, str]]:
    """A directory on a tmpfs of this size; without the right to mount, a limit on the size of files."""
    mount = work / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mount, "tmpfs" if mounted else "limit"
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)], check=False)


def soak_full_disk(work: Path, trials: int, counts: Counter[str]) -> None:
    """Fill the disk at different moments, free it, go on."""
    for trial in range(trials):
        with small_disk(work / f"disk-{trial}" if _made(work / f"disk-{trial}") else work, 2 << 20) as (
            disk,
            how,
        ):
            counts[f"full_disk_{how}"] += 1
            ballast = disk / "ballast"
            if how == "tmpfs":
                ballast.write_bytes(b"x" * ((2 << 20) - (100 << 10) - trial * (60 << 10)))
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (200 + 300 * trial, resource.RLIM_INFINITY))
            try:
                write_level(str(disk / "l1"), 0, trial)
            except (CascacheError, OSError):
                counts["full_disk_refused"] += 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            ballast.unlink(missing_ok=True)
            write_level(str(disk / "l1"), 0, trial)
            repair(verify(str(disk / "l1")))
            write_level(str(disk / "l1"), 0, trial)
            counts["silently_wrong"] += compare(str(disk / "l1"), 0, counts)
            counts["lost"] += 0 if verify(str(disk / "l1")).ok else 1


def _made(path: Path) -> bool:
    path.mkdir()
    return True


def run(kills: int, corruptions: int, seed: int) -> dict[str, int | float]:
    """All of it; returns the counts."""
    counts: Counter[str] = Counter(kills=0, corruptions=0, detected=0, recovered=0, lost=0, silently_wrong=0)
    rng = np.random.default_rng(seed)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    start = time.monotonic()
    try:
        soak_kills(work, kills, rng, counts)
        soak_corruptions(work, corruptions, rng, counts)
        soak_full_disk(work, 8, counts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dict(counts) | {"seconds": round(time.monotonic() - start, 1), "seed": seed}


def main() -> int:
    """Run, print, write the JSON; exit code 1 when anything was lost, wrong or unseen."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--corruptions", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/soak.json"))
    arguments = parser.parse_args()
    result = run(arguments.kills, arguments.corruptions, arguments.seed)
    for name, value in result.items():
        print(f"{name:28s} {value}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    unseen = result["corruptions"] - result["detected"]
    return int(result["lost"] + result["silently_wrong"] + unseen > 0)


if __name__ == "__main__":
    sys.exit(main())
