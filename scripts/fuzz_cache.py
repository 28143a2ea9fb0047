"""Feed readers broken caches, and count what goes wrong: it has to be nothing.

pristine cache ── draw ──> mutation ── on a copy ──> read everything, verify ──> judged
in a child process: a crash of a codec counts too

crashes          an exception that is not one of ours, a signal, or more than a minute
accepted_wrong   a value differs from the truth without an error, though the seals were left alone
accepted_insane  a value that breaks the format's own laws was handed out, whoever sealed it
max_rss_mb       memory of the largest child

python -m scripts.fuzz_cache [--seconds 120] [--seed 0] [--out build/bench/fuzz.json]
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import CascacheError
from common.record import Record, TopK
from schemas.manifest import Encoding, Relation
from scripts.fuzz_mutations import Mutation, draw, mutate, restore
from scripts.soak_data import NUM_PARTS, PART_SAMPLES, VOCAB, level, part_records, same_record

FORK: Final = multiprocessing.get_context("fork")
FUZZ_PARTS: Final = 2
VARIANTS: Final = 2
POOL_IDS: Final = 12
HANG_SECONDS: Final = 60.0
SLACK_NATS: Final = 0.1
"""What rounding may add to a log-probability."""

_KEPT_FAILURES: Final = 40


def make_cache(root: Path, variant: int = 0) -> dict[str, Record]:
    """Write a small level of two parts and its index.

    Args:
        root: Where to.
        variant: 0: pcodec, steps, factors. 1: portable, bfloat16 logits, dictionaries, hidden states and
            image files too.

    Returns:
        The truth, by sample id.
    """
    assert FUZZ_PARTS < NUM_PARTS
    plain = level(0)
    changes: dict[str, Any] = {
        "samples": plain.samples.model_copy(update={"num_samples": FUZZ_PARTS * PART_SAMPLES})
    }
    if variant:
        changes["encoding"] = Encoding(profile="portable", logits="bfloat16")
        changes["with_images"] = True
        changes["relation"] = Relation(store="both", hidden_encoding="int8")
    writer = CacheWriter.open(str(root), plain.model_copy(update=changes), block_rows=60)
    truth: dict[str, Record] = {}
    for part in range(FUZZ_PARTS):
        records = part_records(0, part)
        if variant:
            rng = np.random.default_rng(part)
            records = tuple(_with_few_ids(record, rng) for record in records)
        writer.write_part(part, records, first_sample=part * PART_SAMPLES, num_samples=len(records))
        truth |= {record.sample_id: record for record in records}
    writer.finalize()
    return truth


def _with_few_ids(record: Record, rng: np.random.Generator) -> Record:
    """The same record with ids from a small pool; its images with hidden states and a file."""
    images = []
    for image in record.visual:
        pool = np.random.default_rng(int(image.key[:8], 16))
        hidden = pool.normal(size=(image.num_positions, 8)).astype(np.float32)
        topk = None if image.topk is None else _narrow(image.topk, pool)
        encoded = pool.bytes(int(pool.integers(40, 80)))
        name = hashlib.sha256(encoded).hexdigest()
        images.append(
            dataclasses.replace(image, hidden=hidden, topk=topk, encoded=encoded, image_sha256=name)
        )
    return dataclasses.replace(record, response=_narrow(record.response, rng), visual=tuple(images))


def _narrow(rows: TopK, rng: np.random.Generator) -> TopK:
    pool = rng.permutation(VOCAB)[:POOL_IDS]
    order = np.argsort(rng.random((len(rows.positions), POOL_IDS)), axis=1)[:, : rows.token_ids.shape[1]]
    return dataclasses.replace(rows, token_ids=pool[order].astype(np.int32))


def judge(root: Path, truth: dict[str, Record], *, resealed: bool) -> str:
    """Read everything there is: `refused`, `accepted`, `wrong` or `insane`.

    Args:
        root: The mutated cache.
        truth: What it held before.
        resealed: Whether a hostile author made the seals fit, so that other values are no wonder.
    """
    with suppress(CascacheError):
        verify(str(root))
    try:
        found = _read_all(root)
    except CascacheError:
        return "refused"
    if not all(sane(record) for record in found.values()):
        return "insane"
    right = found.keys() == truth.keys() and all(same_record(found[name], truth[name]) for name in found)
    return "accepted" if right or resealed else "wrong"


def _read_all(root: Path) -> dict[str, Record]:
    """Every record by the id it is asked for: also what a training run would see first."""
    with CacheReader(str(root)) as cache:
        _ = cache.seals, cache.kinds, cache.complete
        for block in range(cache.num_blocks):
            held = cache.read_block(block)
            if cache.manifest.with_images:
                cache.read_images(block)
            for index in range(len(held)):
                held.record(index)
        return {name: cache.read_record(name) for name in cache.sample_ids}


def sane(record: Record) -> bool:
    """Whether a record keeps the promises of `common.record`, whatever its values."""
    good = bool((record.token_ids >= 0).all() and (record.token_ids < VOCAB).all())
    good = (
        good and record.spans[-1].stop == len(record.token_ids) if record.spans else not len(record.token_ids)
    )
    rows = [record.response, *(v.topk for v in record.visual if v.topk is not None)]
    return good and all(_sane_rows(each, len(record.token_ids)) for each in rows) and _sane_factors(record)


def _sane_factors(record: Record) -> bool:
    held = [each for image in record.visual for each in (image.factor, image.hidden) if each is not None]
    return all(bool(np.isfinite(each).all()) for each in held)


def _sane_rows(rows: TopK, length: int) -> bool:
    used = rows.logprobs > -np.inf
    rounded = 2.0**-8 * np.abs(rows.logsumexp[:, :1])
    good = not np.isnan(rows.logprobs).any() and not (rows.logprobs > SLACK_NATS + rounded).any()
    good &= bool(np.isfinite(rows.logsumexp).all()) and not np.isnan(rows.log_tail).any()
    good &= not (rows.log_tail > SLACK_NATS).any()
    good &= bool((rows.token_ids >= 0).all() and (rows.token_ids < VOCAB).all())
    good &= bool((rows.positions >= 0).all() and (rows.positions < length).all())
    return bool(good and not rows.token_ids[~used].any())


def try_one(root: Path, truth: dict[str, Record], mutation: Mutation) -> str:
    """Mutate a copy and judge it; `crash: …` for an exception that is not ours."""
    try:
        mutate(root, mutation)
    except (ValueError, LookupError, TypeError, OSError, RecursionError, AttributeError) as error:
        return f"void: {type(error).__name__}"
    seals_fit = mutation.sealed or mutation.target.startswith("seals/")
    try:
        return judge(root, truth, resealed=seals_fit or mutation.target == "zarr.json")
    except BaseException:  # noqa: BLE001 - codecs written in other languages raise what they like
        return f"crash: {traceback.format_exc()}"


Truths = list[dict[str, Record]]


def _child(pipe: Connection, work: Path, truths: Truths, seed: int, first: int) -> None:
    """Try mutation after mutation, saying before each what it is."""
    warnings.simplefilter("error")
    lasts: list[Mutation | None] = [None] * VARIANTS
    for index in range(first, first + 100_000):
        variant = index % VARIANTS
        pristine, root, last = work / f"pristine-{variant}", work / f"mutated-{variant}", lasts[variant]
        mutation = draw(np.random.default_rng([seed, index]), pristine)
        pipe.send(("try", index, mutation))
        restore(pristine, root, last)
        outcome, lasts[variant] = try_one(root, truths[variant], mutation), mutation
        pipe.send(("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, outcome))


def run(seconds: float = 120.0, seed: int = 0) -> dict[str, Any]:
    """Fuzz for so long; the mutations are a function of the seed.

    Returns:
        Counts, and the mutations that failed with what happened.
    """
    counts, failures, largest = Counter[str](), list[dict[str, Any]](), 0.0
    deadline, index = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="cascache-fuzz-") as name:
        work = Path(name)
        truths = [make_cache(work / f"pristine-{variant}", variant) for variant in range(VARIANTS)]
        while time.monotonic() < deadline:
            ours, theirs = FORK.Pipe(duplex=False)
            child = FORK.Process(target=_child, args=(theirs, work, truths, seed, index), daemon=True)
            child.start()
            theirs.close()
            mutation: Mutation | None = None
            while time.monotonic() < deadline:
                outcome = "crash: a child died or hung"
                with suppress(EOFError):
                    if ours.poll(HANG_SECONDS):
                        word, number, said = ours.recv()
                        if word == "try":
                            index, mutation = number, said
                            continue
                        outcome, largest = said, max(largest, number)
                kind = outcome.split(":")[0]
                counts[kind] += 1
                counts["mutations"] += kind != "void"
                counts["resealed"] += kind != "void" and mutation is not None and mutation.sealed
                if kind in ("crash", "wrong", "insane") and len(failures) < _KEPT_FAILURES:
                    failures.append({"index": index, "mutation": repr(mutation), "outcome": outcome})
                if outcome.startswith("crash: a child"):
                    break
            child.kill()
            child.join()
            index += 1
    return {
        "seed": seed,
        "seconds": seconds,
        "mutations": counts["mutations"],
        "resealed": counts["resealed"],
        "refused": counts["refused"],
        "accepted": counts["accepted"],
        "void": counts["void"],
        "crashes": counts["crash"],
        "accepted_wrong": counts["wrong"],
        "accepted_insane": counts["insane"],
        "max_rss_mb": round(largest, 1),
        "failures": failures,
    }


def main() -> int:
    """Fuzz, write the JSON, say what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/fuzz.json"))
    arguments = parser.parse_args()
    found = run(arguments.seconds, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for failure in found["failures"]:
        print(f"{failure['index']}: {failure['mutation']}\n  {failure['outcome'].strip().splitlines()[-1]}")
    print(json.dumps({k: v for k, v in found.items() if k != "failures"}, indent=1))
    return int(bool(found["crashes"] or found["accepted_wrong"] or found["accepted_insane"]))


if __name__ == "__main__":
    raise SystemExit(main())
