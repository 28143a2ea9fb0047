"""What the cache costs in bytes, errors and time, beside other encodings and readers, in one run.

    simulated rows ──> cache ──> bytes, KL, reads (direct, bare decoder, stock Zarr, zarrs)
            │                                            rivals: encodings, stores
            └ simulated states ──> factor ──> bytes an image, error of the RDist gradient

    python -m scripts.bench_cache [--samples 96] [--dump zarr/l1 ...] [--out build/bench/cache.json]

Times are the best of several runs, CPU microseconds for 800 positions ("a sample"), one thread.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache import layout
from common.cache.block import Block
from common.cache.codec import IdCoding
from common.cache.order import shuffle_distance
from common.cache.part import PartReader
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.shard import inflate
from common.cache.writer import CacheWriter
from common.record import TopK
from schemas.manifest import Encoding, PartSeal, SampleSet
from scripts.bench_cache_data import (
    exact_rows,
    level_of,
    records_of,
    relation_table,
    synthetic_open,
)
from scripts.cache_rivals import STORES, Rival, RowsOf, encodings
from scripts.simulated_vlm import VOCAB, simulated

Array = NDArray[Any]
POSITIONS: Final = 800
ROW_PREFIXES: Final = ("response_", "visual_")


def best_microseconds(work: Callable[[], object], positions: int, *, repeats: int = 7) -> float:
    """Least CPU time of `work` over `repeats`, for 800 positions."""
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least / positions * POSITIONS * 1e6


def kl_nats(exact: TopK, found: TopK) -> Array:
    """65-way KL of each row: kept ids and one bucket for the rest, both sides normalised."""
    p, q = (_with_tail(rows) for rows in (exact, found))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), 0.0)
    return np.asarray(terms.sum(axis=1))


def _with_tail(rows: TopK) -> Array:
    order = np.argsort(rows.token_ids, axis=1, kind="stable")
    kept = np.exp(np.take_along_axis(rows.logprobs, order, axis=1).astype(np.float64))
    mass = np.concatenate([kept, np.exp(rows.log_tail[:, :1].astype(np.float64))], axis=1)
    return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def row_bytes(seal: PartSeal) -> int:
    """Bytes of everything that belongs to rows: ids, logits, tail, logsumexp, positions, and metadata."""
    return sum(file.size_bytes for name, file in seal.files.items() if name.startswith(ROW_PREFIXES))


def bench_bytes(samples: int, work: Path) -> dict[str, Any]:
    """Write the simulated level; bytes, KL and write speed."""
    data = simulated(samples)
    records = records_of(data)
    manifest = level_of(records)
    writer = CacheWriter.open(str(work / "l1"), manifest)
    start = time.process_time()
    seal = writer.write_part(0, records, first_sample=0, num_samples=len(records))
    seconds = time.process_time() - start
    writer.finalize()
    positions = seal.num_response_rows + seal.num_visual_rows
    divergence = []
    with CacheReader(str(work / "l1")) as cache:
        for record in records:
            found = cache.read_block(cache.block_of(cache.index_of(record.sample_id))[0])
            back = found.record(cache.block_of(cache.index_of(record.sample_id))[1])
            pairs = [(record.response, back.response)]
            pairs += [
                (a.topk, b.topk) for a, b in zip(record.visual, back.visual, strict=True) if a.topk and b.topk
            ]
            divergence += [kl_nats(a, b) for a, b in pairs]
    divergences = np.concatenate(divergence)
    sizes: dict[str, int] = {}
    for name, file in seal.files.items():
        sizes[name.split("/")[0]] = sizes.get(name.split("/")[0], 0) + file.size_bytes
    return {
        "positions": positions,
        "bytes_per_position": row_bytes(seal) / positions,
        "bytes_per_position_all_files": sum(f.size_bytes for f in seal.files.values()) / positions,
        "bytes_per_position_by_array": {
            k: v / positions for k, v in sorted(sizes.items(), key=lambda i: -i[1])
        },
        "kl_nats": float(divergences.mean()),
        "kl_nats_max": float(divergences.max()),
        "worst_errors": seal.errors,
        "write_positions_per_second_per_core": positions / seconds,
    }


def bench_reads(work: Path, positions: int) -> dict[str, float]:
    """The same blocks: read, decoded bare, and through stock Zarr."""
    cache = CacheReader(str(work / "l1"))
    part = PartReader(cache.store, f"{layout.PARTS}/{read_seal(cache.store, 0).directory}")
    order = np.random.default_rng(0).permutation(cache.num_blocks).tolist()
    held = [
        {name: (array.read_bytes(b), array.meta, _used(part, name, b)) for name, array in part.arrays.items()}
        for b in order
    ]
    read = best_microseconds(lambda: [cache.read_block(b) and None for b in order], positions)
    bare = best_microseconds(lambda: [_bare(chunks, part, cache) and None for chunks in held], positions)
    result = {
        "block_read_us_per_sample": read,
        "bare_decode_us_per_sample": bare,
        "read_efficiency": bare / read,
    }
    for name, pipeline in {
        "stock_zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
        "zarrs": "zarrs.ZarrsCodecPipeline",
    }.items():
        time_taken = _through_zarr(work, part, cache, order, pipeline, positions)
        if time_taken is not None:
            result[f"{name}_us_per_sample"] = time_taken
    return result


def _used(part: PartReader, name: str, block: int) -> int:
    return part.info.lengths[name][0 if name.endswith("_ids_by_rank") else block] * part.info.ranks.get(
        name, 1
    )


def _bare(chunks: dict[str, Any], part: PartReader, cache: CacheReader) -> Block:
    """Decode chunks that are in memory: no file, no checksum."""
    from common.cache.buffers import SHELF

    columns = {}
    for name, (data, meta, length) in chunks.items():
        if name.endswith("_ids_by_rank"):
            columns[name] = part.read_columns(0, (name,))[name]
            continue
        out = SHELF.empty((length,), meta.dtype)
        inflate(data, meta, out)
        columns[name] = out if name not in part.info.ranks else out.reshape(part.info.ranks[name], -1)
    return Block(columns, part.info.codings, cache.manifest, "memory")


def _through_zarr(
    work: Path, part: PartReader, cache: CacheReader, order: list[int], pipeline: str, positions: int
) -> float | None:
    """The same work with Zarr's own reading of every array, then the same decoding of rows."""
    import zarr

    directory = read_seal(cache.store, 0).directory
    codings: dict[str, IdCoding] = part.info.codings
    with warnings.catch_warnings(), zarr.config.set({"codec_pipeline.path": pipeline}):
        warnings.simplefilter("ignore")
        try:
            group = zarr.open_group(str(work / "l1" / "parts" / directory), mode="r")
            arrays = {name: group[name] for name in part.arrays}

            def read(block: int) -> bool:
                columns = {}
                for name, array in arrays.items():
                    at = 0 if name.endswith("_ids_by_rank") else block
                    values = np.asarray(array[at])[: _used(part, name, at)]
                    columns[name] = (
                        values if name not in part.info.ranks else values.reshape(part.info.ranks[name], -1)
                    )
                return len(Block(columns, codings, cache.manifest, "zarr")) > 0

            read(order[0])
            return best_microseconds(lambda: all(read(b) for b in order), positions, repeats=3)
        except (ImportError, ValueError, TypeError, RuntimeError, KeyError) as error:
            print(f"  {pipeline}: not measured ({error})")
            return None


def bench_rivals(samples: int, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sizes and KL of other encodings, read times of other stores."""
    exact, offsets = exact_rows(simulated(samples))
    rows = RowsOf(exact.token_ids, exact.logprobs, offsets)
    sized = []
    for name, (size, back) in encodings(rows, VOCAB).items():
        found = TopK(exact.positions, exact.token_ids, back, exact.log_tail, exact.logsumexp)
        sized.append(
            {"name": name, "bytes_per_position": size, "kl_nats": float(kl_nats(exact, found).mean())}
        )
    timed = []
    order = np.random.default_rng(0).permutation(samples).tolist()
    for name, write in STORES.items():
        store = write(rows, work / name.split()[0])
        taken = read_time(store, order, len(rows.token_ids))
        timed.append({"name": name, "us_per_sample": taken, "bytes_per_position": store.bytes_per_position})
    return sized, timed


def read_time(store: Rival, order: list[int], positions: int) -> float:
    """Microseconds a sample to read every sample once, in this order."""

    def read_all() -> None:
        for index in order:
            store.read(index)

    return best_microseconds(read_all, positions, repeats=3)


def bench_sharing(work: Path) -> list[dict[str, float]]:
    """Bytes a sample with 1, 3 and 10 questions an image: visual knowledge is stored once."""
    table = []
    for questions in (1, 3, 10):
        records = records_of(simulated(24), questions=questions)
        path = work / f"questions-{questions}"
        writer = CacheWriter.open(str(path), level_of(records))
        seal = writer.write_part(0, records, first_sample=0, num_samples=len(records))
        size = sum(file.size_bytes for file in seal.files.values())
        table.append(
            {"questions": questions, "bytes_per_sample": size / len(records), "images": seal.num_images}
        )
        shutil.rmtree(path)
    return table


def bench_shuffle() -> list[dict[str, float]]:
    """Mixing of windows against a full permutation: images of 10 questions, 20 samples a block."""
    offsets = np.arange(0, 20 * 2000 + 1, 20, dtype=np.int64)
    groups = np.arange(20 * 2000) // 20
    windows = (1, 8, 32, 128, 512, 2000)
    return [
        {
            "window_blocks": w,
            "pairs_vs_permutation": shuffle_distance(groups, offsets, window_blocks=w, batch=256),
        }
        for w in windows
    ]


def bench_dump(path: str, work: Path) -> dict[str, Any]:
    """Bytes a position of a real dump and its read time; exact logits are encoded anew, for the KL."""
    divergence: float | None = None
    with CacheReader(path) as cache:
        if cache.manifest.encoding.logits == "float32":
            path = str(work / f"again-{Path(path).name}")
            divergence = reencode(cache, path)
    with CacheReader(path) as cache:
        rows = sum(s.num_response_rows + s.num_visual_rows for s in cache.seals.values())
        size = sum(row_bytes(seal) for seal in cache.seals.values())
        everything = sum(f.size_bytes for seal in cache.seals.values() for f in seal.files.values())
        order = range(cache.num_blocks)
        taken = best_microseconds(lambda: [cache.read_block(b) and None for b in order], rows, repeats=3)
        return {
            "teacher": cache.manifest.teacher.model,
            "positions": rows,
            "vocab_rows": cache.manifest.vocab_rows,
            "topk": cache.manifest.capture.topk,
            "logit_step": cache.manifest.encoding.logit_step,
            "bytes_per_position": size / rows,
            "bytes_per_position_all_files": everything / rows,
            "kl_nats": divergence,
            "block_read_us_per_sample": taken,
        }


def reencode(exact: CacheReader, path: str) -> float:
    """Write a level's records again in one part, logits as steps; returns the mean KL in nats."""
    records = [exact.read_record(i) for i in range(exact.num_samples)]
    update = {"encoding": Encoding(), "samples": SampleSet(fingerprint="again", num_samples=len(records))}
    manifest = exact.manifest.model_copy(update=update | {"part_samples": len(records)})
    CacheWriter.open(path, manifest).write_part(0, records, first_sample=0, num_samples=len(records))
    divergences = []
    with CacheReader(path) as cache:
        for index, record in enumerate(records):
            found = cache.read_record(index)
            divergences.append(kl_nats(record.response, found.response))
            pairs = zip(record.visual, found.visual, strict=True)
            divergences += [
                kl_nats(a.topk, b.topk) for a, b in pairs if a.topk is not None and b.topk is not None
            ]
    return float(np.concatenate(divergences).mean())


def run(samples: int, dumps: list[str]) -> dict[str, Any]:
    """Everything, as one JSON value."""
    work = Path(tempfile.mkdtemp(prefix="bench-cache-"))
    try:
        result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "samples": samples}
        result |= bench_bytes(samples, work)
        result |= bench_reads(work, result["positions"])
        result |= relation_table(work)
        result["encodings"], result["stores"] = bench_rivals(samples, work)
        result["sharing"] = bench_sharing(work)
        result["shuffle"] = bench_shuffle()
        result |= synthetic_open(work)
        result["dumps"] = [bench_dump(path, work) for path in dumps]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for name, value in result.items():
        if isinstance(value, float | int | str):
            print(f"{name:44s} {value:.4g}" if isinstance(value, float) else f"{name:44s} {value}")
        elif isinstance(value, dict):
            print(name)
            for key, number in value.items():
                print(f"  {key:42s} {number:.4g}")
        elif isinstance(value, list):
            print(name)
            for entry in value:
                print(
                    "  " + "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in entry.values())
                )


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--dump", action="append", default=[], help="a real cache to measure too")
    parser.add_argument("--out", type=Path, default=Path("build/bench/cache.json"))
    arguments = parser.parse_args()
    result = run(arguments.samples, arguments.dump)
    show(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
