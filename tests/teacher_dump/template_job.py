"""Dump cases for `forked`: every shape of chat template, through the command and one engine."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacher_dump import dump
from teacher_dump.cli import main
from teacher_dump.engine import Engine, EngineSettings
from tests.teacher_dump.dump_job import said
from tests.teacher_dump.examples import SIZES, picture
from tests.templates import CHANGING, TEMPLATES, fit

QUESTIONS = ("is it a red dog, or two?", "what is a red dog?", "two or a red dog. and more?")
ANSWERS = ("a red dog.", "two", "a red dog.")
OWN = ("llava15", "onevision_hub", "qwen3_5_think")


def write_talks(directory: Path) -> Path:
    """One, two and three turns about no, one and two images, in LLaVA's format."""
    directory.mkdir(exist_ok=True)
    entries = []
    for turns in (1, 2, 3):
        for images in (0, 1, 2):
            files = [f"{turns}-{number}.png" for number in range(images)]
            for number, file in enumerate(files):
                (directory / file).write_bytes(picture(turns * 2 + number, *SIZES[number]))
            talk = []
            for turn in range(turns):
                marks = "<image>\n" * images if turn == 0 else ""
                talk.append({"from": "human", "value": marks + QUESTIONS[turn]})
                talk.append({"from": "gpt", "value": ANSWERS[turn]})
            shown = {"image": files[0] if images == 1 else files} if images else {}
            entries.append({"id": f"{turns}-{images}", **shown, "conversations": talk})
    file = directory / "train.json"
    file.write_text(json.dumps(entries))
    return file


@contextlib.contextmanager
def one_engine() -> Iterator[list[Engine]]:
    """Let all dumps of this process share the engine that the first one starts; all ask for the same."""
    started: list[Engine] = []
    choose = dump.choose_engine

    def lend(settings: EngineSettings) -> Any:
        if not started:
            started.append(choose(settings).__enter__())
        assert started[0].settings == settings
        return contextlib.nullcontext(started[0])

    dump.choose_engine = lend
    try:
        yield started
    finally:
        dump.choose_engine = choose
        for each in started:
            each.__exit__(None, None, None)


def templates(models: Path) -> dict[str, Any]:
    """Each template's dump of the same talks; own answers under some; what resuming with another says."""
    root = models.with_name("templates")
    data = write_talks(root)
    files = {}
    for name in (*TEMPLATES, *CHANGING):
        files[name] = root / f"{name}.jinja"
        files[name].write_text(fit(name, "<image>"))

    def run(template: str, out: str, *flags: str) -> tuple[int, str]:
        base = ["--model", str(root / "model"), "--data", str(data), "--out", str(root / out), "--topk", "64"]
        base += ["--max-num-seqs", "4", "--logits", "float32"]
        return said(lambda: main([*base, "--chat-template", str(files[template]), *flags]))

    with one_engine() as started:
        found: dict[str, Any] = {"title": run("title", "never")}
        assert not started, "a template that changes answers is refused before an engine starts"
        found["dumped"] = {name: run(name, name) for name in TEMPLATES}
        found["twin"] = run("qwen3_5_nothink", "qwen3_5_think")
        found["another"] = run("onevision", "onevision_hub")
        own = ("--responses", "teacher", "--max-new-tokens", "6")
        found["own"] = {name: run(name, f"own-{name}", *own) for name in OWN}
        found["own twin"] = run("qwen3_5_nothink", "own-qwen3_5_think", *own)
    return found
