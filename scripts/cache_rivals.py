"""Other systems' encodings and stores, re-implemented from their descriptions, on the same rows.

Each encoding gives bytes and the log-probs it gives back; each store writes the rows to disk once and reads
samples in random order. Names say whose shape it is; none of their code is used.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Rows of many samples."""

    token_ids: NDArray[np.int32]
    """[N, K] ids."""
    logprobs: NDArray[np.float32]
    """[N, K] log-probs."""
    offsets: NDArray[np.int64]
    """[S + 1] first row of each sample."""


def pack_bits(values: Array, bits: int) -> bytes:
    """Unsigned integers with `bits` bits each, one after the other."""
    wide = (values.reshape(-1, 1).astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(wide.astype(np.uint8)).tobytes()


def bfloat16(values: Array) -> Array:
    """Rounded to bfloat16, as float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32)).view(np.float32)


def encodings(rows: RowsOf, vocab: int) -> dict[str, tuple[float, Array]]:
    """Bytes a position and log-probs given back, by name."""
    ids, logprobs, count = rows.token_ids, rows.logprobs, len(rows.token_ids)
    bits = int(np.ceil(np.log2(vocab)))
    packed = len(pack_bits(ids, bits))
    half = logprobs.astype(np.float16)
    low, high = (ids & 0xFFFF).astype(np.uint16), pack_bits(ids >> 16, bits - 16)
    squeezed = len(zstd.compress(half.tobytes(), 3)) + len(zstd.compress(low.tobytes() + high, 3))
    short = (logprobs.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    text = sum(
        len(json.dumps({int(i): round(float(np.exp(v)), 6) for i, v in zip(*row, strict=True)}))
        for row in _sample(rows)
    )
    return {
        "int32 ids + float32": (8.0 * ids.shape[1], logprobs),
        "int64 ids + float32 (MaxText's shape)": (12.0 * ids.shape[1], logprobs),
        f"{bits}-bit ids + float16 (DistillKit's, Megatron's shape)": (
            (packed + half.nbytes) / count,
            half.astype(np.float32),
        ),
        f"{bits}-bit ids + bfloat16": ((packed + short.nbytes) / count, bfloat16(logprobs)),
        "zstd of float16 and of split ids": (squeezed / count, half.astype(np.float32)),
        "JSON lines {id: probability} (EasyDistill's shape)": (text / len(_sample(rows)), logprobs),
    }


def _sample(rows: RowsOf) -> list[tuple[Array, Array]]:
    chosen = range(0, len(rows.token_ids), max(1, len(rows.token_ids) // 500))
    return [(rows.token_ids[i], rows.logprobs[i]) for i in chosen]


@dataclass(frozen=True, slots=True)
class Rival:
    """A store on disk and a way to read a sample of it."""

    bytes_per_position: float
    """Of the files."""
    read: Callable[[int], tuple[Array, Array]]
    """Sample index → ids [n, K] int32, log-probs [n, K] (float16 or float32)."""


def write_memmap(rows: RowsOf, root: Path) -> Rival:
    """Raw int32 ids and float16, memory-mapped, copied out a sample at a time."""
    root.mkdir(parents=True)
    rows.token_ids.tofile(root / "ids")
    rows.logprobs.astype(np.float16).tofile(root / "logprobs")
    shape = rows.token_ids.shape
    ids = np.memmap(root / "ids", np.int32, "r", shape=shape)
    logprobs = np.memmap(root / "logprobs", np.float16, "r", shape=shape)

    def read(index: int) -> tuple[Array, Array]:
        start, stop = rows.offsets[index : index + 2]
        return np.array(ids[start:stop]), np.array(logprobs[start:stop])

    return Rival(6.0 * shape[1], read)


def write_mds(rows: RowsOf, root: Path) -> Rival:
    """MosaicML's MDS layout: count, offsets, samples; a sample is its fields' sizes and bytes."""
    root.mkdir(parents=True)
    samples = []
    for start, stop in zip(rows.offsets, rows.offsets[1:], strict=False):
        fields = [
            rows.token_ids[start:stop].tobytes(),
            rows.logprobs[start:stop].astype(np.float16).tobytes(),
        ]
        samples.append(np.array([len(f) for f in fields], np.uint32).tobytes() + b"".join(fields))
    ends = np.cumsum([4 * (len(samples) + 2)] + [len(s) for s in samples]).astype(np.uint32)
    path = root / "shard.00000.mds"
    path.write_bytes(np.uint32(len(samples)).tobytes() + ends.tobytes() + b"".join(samples))
    topk, file = rows.token_ids.shape[1], path.open("rb")

    def read(index: int) -> tuple[Array, Array]:
        file.seek(4 * (1 + index))
        start, stop = np.frombuffer(file.read(8), np.uint32)
        file.seek(int(start))
        data = file.read(int(stop - start))
        cut = 8 + int(np.frombuffer(data, np.uint32, 1)[0])
        ids = np.frombuffer(data[8:cut], np.int32).reshape(-1, topk)
        return ids, np.frombuffer(data[cut:], np.float16).reshape(-1, topk)

    return Rival(path.stat().st_size / len(rows.token_ids), read)


def write_arrow(rows: RowsOf, root: Path) -> Rival:
    """An Arrow file of lists, memory-mapped: what a Hugging Face data set is on disk."""
    import pyarrow as pa

    root.mkdir(parents=True)
    table, path = _arrow_table(rows), root / "data.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    opened = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return Rival(path.stat().st_size / len(rows.token_ids), _arrow_reader(opened, rows))


def write_parquet(rows: RowsOf, root: Path) -> Rival:
    """Parquet with zstd, a row group for 16 samples; a sample costs its group, kept for the next one."""
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    path = root / "data.parquet"
    pq.write_table(_arrow_table(rows), path, compression="zstd", row_group_size=16)
    file = pq.ParquetFile(path)
    last: dict[int, Any] = {}
    topk = rows.token_ids.shape[1]

    def read(index: int) -> tuple[Array, Array]:
        group, place = divmod(index, 16)
        if group not in last:
            last.clear()
            last[group] = file.read_row_group(group)
        ids, logprobs = (last[group].column(name)[place].values.to_numpy() for name in ("ids", "logprobs"))
        return ids.reshape(-1, topk), logprobs.reshape(-1, topk)

    return Rival(path.stat().st_size / len(rows.token_ids), read)


def _arrow_table(rows: RowsOf) -> Any:
    import pyarrow as pa

    ends = pa.array(rows.offsets * rows.token_ids.shape[1], pa.int32())
    ids = pa.ListArray.from_arrays(ends, pa.array(rows.token_ids.reshape(-1)))
    logprobs = pa.ListArray.from_arrays(ends, pa.array(rows.logprobs.astype(np.float16).reshape(-1)))
    return pa.table({"ids": ids, "logprobs": logprobs})


def _arrow_reader(table: Any, rows: RowsOf) -> Callable[[int], tuple[Array, Array]]:
    topk = rows.token_ids.shape[1]

    def read(index: int) -> tuple[Array, Array]:
        ids, logprobs = (table.column(name)[index].values.to_numpy() for name in ("ids", "logprobs"))
        return np.array(ids).reshape(-1, topk), np.array(logprobs).reshape(-1, topk)

    return read


STORES: dict[str, Callable[[RowsOf, Path], Rival]] = {
    "memmap, int32 + float16": write_memmap,
    "MDS layout (MosaicML's shape), int32 + float16": write_mds,
    "Arrow file (Hugging Face's shape), int32 + float16": write_arrow,
    "Parquet zstd, int32 + float16": write_parquet,
}
"""Stores by name; all but memmap are re-implemented layouts, not their packages."""
