"""Engine cases for `forked`: an engine in a process of its own, refusals, deaths, many padding rows."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import EngineError
from common.processor import load_processor
from teacher_dump.engine import Engine, Question, Submission
from tests.teacher_dump.engine_job import settings
from tests.teacher_dump.examples import prepare, samples, submission

FAMILY = "llava_siglip"


def children(pid: int) -> dict[int, str]:
    """Command lines of a process's children, by id."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                title = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(place.name)] = title
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def workers_of(pid: int) -> tuple[int, int]:
    """The engine process of a driver and the worker that it started."""
    core = next(each for each, title in children(pid).items() if "EngineCore" in title)
    return core, next(each for each, title in children(core).items() if "Worker" in title)


class Watched:
    """Command lines that this process's children have had meanwhile."""

    def __enter__(self) -> set[str]:
        self.seen: set[str] = set()
        self.done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        return self.seen

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.seen.update(children(os.getpid()).values())

    def __exit__(self, *_: object) -> None:
        self.done.set()


def same(models: Path) -> dict[str, Any]:
    """Every sample captured in this process, alone and all together."""
    processor = load_processor(str(models / FAMILY))
    with Engine(settings(models / FAMILY)) as engine:
        return _capture(engine, [submission(prepare(processor, each)) for each in samples()])


def _capture(engine: Engine, work: list[Submission]) -> dict[str, Any]:
    return {"alone": [engine.run([each])[0] for each in work], "together": engine.run(work)}


def own(models: Path) -> dict[str, Any]:
    """The same by an engine process; then what vLLM itself refuses; then its worker is killed."""
    processor = load_processor(str(models / FAMILY))
    items = [prepare(processor, each) for each in samples()]
    with Watched() as titles:
        engine = Engine(settings(models / FAMILY, inside=False)).__enter__()
    captured = _capture(engine, [submission(each) for each in items])
    text = items[-1]
    long = replace(text.prompt, prompt_ids=np.tile(text.prompt.prompt_ids, 60))
    question = Question(text.prompt, (), max_tokens=0, temperature=0.0, seed=1, banned=())
    answer = {
        **captured,
        "titles": titles,
        "too long": engine.run([replace(submission(text), prompt=long)])[0],
        "no room": engine.answer([question])[0],
        "after": engine.run([submission(text)])[0],
    }
    core, worker = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    answer["killed"] = _stops(engine, [submission(each) for each in items])
    engine.close()
    answer["left"] = _gone(core, worker)
    return answer


def _stops(engine: Engine, work: list[Submission]) -> str:
    try:
        while True:
            engine.run(work)
    except EngineError as error:
        return f"{type(error).__name__}: {error}"


def _gone(*pids: int) -> list[int]:
    """Those that still run after ten seconds."""
    until = time.monotonic() + 10
    while (left := [each for each in pids if Path(f"/proc/{each}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def padded(models: Path) -> dict[str, Any]:
    """Answers of a teacher whose head has more padding rows than vLLM takes biased ids."""
    model = models / "padded" / FAMILY
    processor = load_processor(str(model))
    size = len(processor.tokenizer)
    banned = tuple(range(size, 2048))
    items = [prepare(processor, each) for each in samples()]
    with Engine(settings(model)) as engine:
        told: list[dict[int, float]] = []
        inner = engine._llm.enqueue
        engine._llm.enqueue = lambda prompts, params, **options: (
            told.extend(each.logit_bias or {} for each in params),
            inner(prompts, params, **options),
        )[1]
        ask = [
            Question(each.prompt, each.pixels, 24, temperature, 5, (7, *banned))
            for each in items
            for temperature in (0.0, 1.0)
        ]
        free = [replace(each, banned=()) for each in ask]
        engine._masked = True  # as if padding rows were no concern
        unmasked = engine.answer(free)
        engine._masked = False
        return {"answers": engine.answer(ask), "unmasked": unmasked, "size": size, "told": told[len(free) :]}
