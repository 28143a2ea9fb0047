"""Caches and samples -> a restorable stream of batches, read ahead of the step.

    step ──Sampler──> global batch ──rank──> records + pixels ──micro-batches──> collate ──> Batch

    threads    step s+1  s+2  s+3 ...   blocks decoded once, images loaded and checked
    caller     step s                   waits only when the threads are behind

Every step is built from its number alone, so a stream that starts at step s equals the rest of one
that started at 0.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.record import Record
from student_train.batch import Batch, without_targets
from student_train.collate import Example, InputLayout, Wanted, collate
from student_train.pixels import PixelLoader
from student_train.recent import Recent
from student_train.regrid import regrid
from student_train.sampling import Described, Sampler


class Block(Protocol):
    """Whole samples, decoded together."""

    def record(self, index: int, /) -> Record:
        """Return one of the block's records."""
        ...


class Readable(Described, Protocol):
    """What the stream needs of a cache; `common.cache.reader.CacheReader` is one."""

    def read_block(self, block: int, /) -> Block:
        """Decode a block."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of every global batch this process works on."""

    rank: int = 0
    """This process."""
    world_size: int = 1
    """All of them."""
    micro_batch: int | None = None
    """Samples a forward pass; None takes the whole share at once."""

    def mine(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this process's entries of a global batch."""
        return batch[self.rank :: self.world_size]

    def num_micro_batches(self, num_samples: int) -> int:
        """Return the forward passes that a global batch takes: as many in every process, or they hang."""
        largest = -(-num_samples // self.world_size)
        return -(-largest // (self.micro_batch or largest))


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one optimiser step works on, in this process."""

    step: int
    """Step within the stage, from 0."""
    batches: tuple[Batch, ...]
    """Micro-batches."""
    read_seconds: float
    """Time a thread spent on making them."""


class RecordSource:
    """Records by index, a few decoded blocks kept."""

    def __init__(self, cache: Readable, *, keep_blocks: int) -> None:
        """Wrap a cache; keep that many decoded blocks."""
        self._cache = cache
        self._starts = np.asarray(cache.block_offsets)
        self._recent: Recent[int, Block] = Recent(capacity=keep_blocks)

    def record(self, index: int) -> Record:
        """Return the record of a sample index."""
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        decoded = self._recent.get(block, lambda: self._cache.read_block(block))
        return decoded.record(index - int(self._starts[block]))


class Stream:
    """The batches of one stage, from any step on."""

    def __init__(
        self,
        records: RecordSource,
        pixels: PixelLoader | None,
        sampler: Sampler,
        layout: InputLayout,
        wanted: Wanted,
        *,
        share: Share,
        workers: int,
        prefetch: int,
        first_batch_only: bool = False,
        pin: bool = False,
    ) -> None:
        """Put the pieces together.

        Args:
            records: The cache.
            pixels: The data's images; None for a text-only cache.
            sampler: Which samples a step sees.
            layout: The student's ids.
            wanted: Which targets the stage's terms need.
            share: This process's part.
            workers: Threads that read ahead.
            prefetch: Steps they read ahead.
            first_batch_only: Repeat the first step's batch, to see that a model can learn it.
            pin: Leave batches in page-locked memory; needs CUDA.
        """
        self._records = records
        self._pixels = pixels
        self._sampler = sampler
        self._layout = layout
        self._wanted = wanted
        self._share = share
        self._workers = workers
        self._prefetch = prefetch
        self._first_only = first_batch_only
        self._pin = pin

    def read_step(self, step: int) -> StepInput:
        """Build one step's micro-batches, in the calling thread."""
        began = time.perf_counter()
        whole = self._sampler.batch(0 if self._first_only else step)
        examples = [self._example(int(epoch), int(index)) for epoch, index in self._share.mine(whole)]
        num = self._share.num_micro_batches(len(whole))
        if num > 1:
            examples.sort(key=lambda example: len(example.record.token_ids))
        parts = [[examples[row] for row in rows] for rows in np.array_split(range(len(examples)), num)]
        batches = [self._collate(part) if part else self._idle(whole[0]) for part in parts]
        return StepInput(step, tuple(batches), time.perf_counter() - began)

    def read_steps(self, first: int, stop: int) -> Generator[StepInput]:
        """Yield the steps of `[first, stop)`, read ahead by threads.

        Args:
            first: Step to start with: 0, or where a checkpoint left off.
            stop: One past the last step.
        """
        waiting: deque[Future[StepInput]] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="stream") as pool:
            try:
                for step in range(first, stop):
                    waiting.append(pool.submit(self.read_step, step))
                    if len(waiting) > self._prefetch:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate(examples, self._layout, self._wanted)
        return batch.pinned() if self._pin else batch

    def _idle(self, entry: NDArray[np.int64]) -> Batch:
        """A batch without targets, for a process that has no sample left while others still work."""
        example = self._example(int(entry[0]), int(entry[1]))
        return without_targets(collate([example], self._layout, self._wanted))

    def _example(self, epoch: int, index: int) -> Example:
        record = self._records.record(index)
        pixels = self._pixels.load(record) if self._pixels is not None else None
        if pixels is None or not pixels.layouts:
            return Example(record, pixels, epoch, index)
        teacher_tiles = tuple(image.tiles for image in record.visual)
        return Example(regrid(record, pixels.layouts), pixels, epoch, index, teacher_tiles)


def input_layout(processor: Any, image_token_id: int, *, token_types: bool, vocab_size: int) -> InputLayout:
    """Describe the student's ids.

    Args:
        processor: Its processor.
        image_token_id: Id at image positions, from its configuration.
        token_types: See `InputLayout`.
        vocab_size: See `InputLayout`.
    """
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return InputLayout(int(pad or 0), image_token_id, token_types, vocab_size)
