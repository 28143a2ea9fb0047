"""Dump cases for `forked`: the command itself, whole, killed, interrupted, on bad data."""

import contextlib
import io
import json
import os
import random
import re
import resource
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.cache.writer import sealed_parts
from scripts.loopback_s3 import serve_bucket_apart, use
from teacher_dump import dump
from teacher_dump.cli import main
from tests.teacher_dump.examples import ANSWERS, QUESTIONS, SIZES, picture
from tests.teacher_dump.forked import fork

NUM_SAMPLES = 48
IMAGES_EVERY = 3


def write_data(directory: Path, num_samples: int = NUM_SAMPLES) -> Path:
    """A LLaVA JSON file: three questions an image, the images mixed; every seventh sample text-only."""
    directory.mkdir(exist_ok=True)
    num_images = num_samples // IMAGES_EVERY
    entries = []
    for index in range(num_samples):
        image = f"{index % num_images}.png"
        (directory / image).write_bytes(picture(index % num_images, *SIZES[index % num_images % len(SIZES)]))
        mark = "" if index % 7 == 6 else "<image>\n"
        talk = [
            {"from": "human", "value": mark + QUESTIONS[index % len(QUESTIONS)]},
            {"from": "gpt", "value": ANSWERS[index % len(ANSWERS)]},
        ]
        entry = {"id": f"s{index:03}", "conversations": talk}
        entries.append({**entry, "image": image} if mark else entry)
    file = directory / "train.json"
    file.write_text(json.dumps(entries))
    return file


def work_of(models: Path) -> Path:
    """Where the dumps go: beside the models."""
    work = models.with_name("dumps")
    work.mkdir(exist_ok=True)
    return work


def command(models: Path, data: Path, out: Path, *more: str) -> list[str]:
    base = ["--model", str(models / "llava_siglip"), "--data", str(data), "--out", str(out), "--topk", "16"]
    return [
        *base,
        "--part-samples",
        "6",
        "--max-num-seqs",
        "4",
        "--engine-arg",
        "max_num_batched_tokens=512",
        *more,
    ]


def said(action: Callable[[], int]) -> tuple[int, str]:
    """Status and standard error of an action."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
        return action(), heard.getvalue()


def whole(models: Path) -> tuple[int, str]:
    """In one go."""
    root = work_of(models)
    return said(lambda: main(command(models, write_data(root / "data"), root / "whole")))


def trial(models: Path) -> dict[str, Any]:
    """Half of the samples really dumped to tell what all of them will take."""
    root = work_of(models)
    asked = ["--dry-run", "--sample-estimate", "24", "--json"]
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        assert main(command(models, write_data(root / "data"), root / "tried", *asked)) == 0
    return {"plan": json.loads(heard.getvalue()), "left": (root / "tried").exists()}


def killed(models: Path) -> dict[str, Any]:
    """Killed twice at random moments after a seal, then run to the end."""
    root, draw = work_of(models), random.Random(time.time_ns())
    arguments = command(models, write_data(root / "data"), root / "killed")
    progress = [0]
    for _ in range(2):
        child = fork(lambda: main(arguments))
        _wait_for_seals(root / "killed", progress[-1] + 1, child)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        progress.append(len(sealed_parts(root / "killed")))
    status = os.waitpid(fork(lambda: main(arguments)), 0)[1]
    again = said(lambda: main(arguments))
    return {"progress": progress, "status": os.waitstatus_to_exitcode(status), "again": again}


def bucket(models: Path) -> dict[str, Any]:
    """Straight into an S3 bucket, killed after the second seal, then run to the end."""
    data = write_data(work_of(models) / "data")
    here = work_of(models) / "here"
    here.mkdir()
    with serve_bucket_apart("caches") as environment, use(environment):
        os.chdir(here)
        arguments = command(models, data, Path("out"))
        arguments[arguments.index("out")] = "s3://caches/team/l1"
        child = fork(lambda: main(arguments))
        while (before := _seals_in_bucket(environment)) < 2:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the dump ended before it was killed"
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: main(arguments)), 0)[1])
        with CacheReader("s3://caches/team/l1") as cache:
            records = [cache.read_record(name) for name in cache.sample_ids]
        report = verify("s3://caches/team/l1")
        planned = json.loads(said(lambda: main([*arguments, "--dry-run", "--json"]))[1])
    return {
        "before": before,
        "status": status,
        "records": records,
        "problems": report.problems,
        "free": planned["disk_free_bytes"],
        "left": [file.name for file in here.rglob("*") if file.is_file()],
    }


def _seals_in_bucket(environment: dict[str, str]) -> int:
    """By plain HTTP: a client with threads would not survive the fork."""
    request = urllib.request.Request(f"{environment['AWS_ENDPOINT_URL']}/caches?prefix=team/l1/seals/")
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
    with urllib.request.urlopen(request) as answer:
        return len(re.findall(rb"seals/\d+/zarr.json</Key>", answer.read()))


def response_only(models: Path) -> tuple[int, str]:
    """No rows and no relation of any image."""
    root = work_of(models)
    arguments = command(models, write_data(root / "data"), root / "response-only")
    return said(lambda: main([*arguments, "--positions", "response", "--relation-store", "none"]))


def interrupted(models: Path) -> dict[str, Any]:
    """Ctrl-C after the first seal."""
    root = work_of(models)
    arguments = command(models, write_data(root / "data"), root / "interrupted")
    heard = root / "interrupted.log"

    def run() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts out deaf to it
        seal = dump.seal_part
        dump.seal_part = lambda *parts: (time.sleep(0.3), seal(*parts))[1]  # time enough to interrupt it
        with heard.open("w") as file, contextlib.redirect_stderr(file):
            return main(arguments)

    child = fork(run)
    _wait_for_seals(root / "interrupted", 1, child)
    os.kill(child, signal.SIGINT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "said": heard.read_text(), "sealed": len(sealed_parts(root / "interrupted"))}


def write_bad_data(directory: Path) -> Path:
    """The same with one sample of every fault."""
    file = write_data(directory)
    entries = json.loads(file.read_text())
    (file.parent / "empty.png").write_bytes(b"")
    (file.parent / "cut.png").write_bytes(picture(0, 60, 60)[:200])
    (file.parent / "text.png").write_bytes(b"no image at all")
    entries[0]["image"] = "nowhere.png"
    entries[1]["image"] = "empty.png"
    entries[2]["image"] = "cut.png"
    entries[3]["image"] = "text.png"
    entries[4]["conversations"][0]["value"] = "no mark"
    entries[5]["conversations"][0]["value"] = "<image>\n<image>\ntwo marks"
    entries[6]["conversations"][1]["value"] = ""
    entries[8]["conversations"][1]["value"] = "the dog sat on the mat and " * 200
    entries[10]["conversations"][1]["value"] = "half a pair \ud83d"
    entries[11]["video"] = "clip.mp4"
    file.write_text(json.dumps(entries))
    return file


def bad(models: Path) -> dict[str, Any]:
    """Data with one sample of every fault, under a generous and under a strict limit."""
    root = work_of(models)
    file = write_bad_data(root / "bad")
    arguments = command(models, file, root / "badly", "--max-len", "400")
    strict = said(lambda: main([*arguments, "--max-quarantine", "0.05"]))
    sealed = len(sealed_parts(root / "badly"))
    generous = said(lambda: main([*arguments, "--max-quarantine", "0.5"]))
    lines = (root / "badly.quarantine.jsonl").read_text().splitlines()
    return {
        "strict": strict,
        "sealed": sealed,
        "generous": generous,
        "lines": [json.loads(line) for line in lines],
    }


def full_disk(models: Path) -> dict[str, Any]:
    """Writes beyond a few kilobytes fail, as on a full disk."""
    root = work_of(models)
    data = write_data(root / "data")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    refused = said(lambda: main(command(models, data, root / "full")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"refused": refused, "sealed": len(sealed_parts(root / "full"))}


def without_vllm(models: Path) -> tuple[int, str]:
    """Where vLLM is not installed."""
    root = work_of(models)
    data = write_data(root / "data")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        sys.modules[name] = None  # type: ignore[assignment]
    return said(lambda: main(command(models, data, root / "never")))


def _wait_for_seals(cache: Path, count: int, child: int) -> None:
    while len(sealed_parts(cache)) < count:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the dump ended before it was stopped"
        time.sleep(0.01)
