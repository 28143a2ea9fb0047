"""Cases for `forked` that take a preset through the commands: plan, dump, verify, train, dump the student.

`models` holds the built presets under their names and the photos; caches and runs go beside them.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tests.presets.facts import families, presets

RECIPE = """
base = "tiny"
[[levels]]
stages = [{name = "dft", steps = 1, batch_size = 2, learning_rate = 1e-5, kinds = []}]
[[levels]]
stages = [
    {name = "dpt", steps = 1, batch_size = 2, kinds = []},
    {name = "sft", steps = 1, batch_size = 2, kinds = []},
    {name = "dft", steps = 1, batch_size = 2, kinds = []},
]
"""
WAYS = {
    "own": ["--limit", "2"],
    "exact": ["--dtype", "float32", "--visual-fraction", "0.05", "--logits", "float32"],
}
"""All rows of two images in the dtype of the files; some rows of all images in float32."""


def dump(models: Path, model: str, out: str, way: str) -> tuple[int, str]:
    """Status and messages of `teacher-dump --model MODEL --topk 64`."""
    from teacher_dump.cli import main

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
        status = main([*_command(models, model, models / out), *WAYS[way]])
    return status, heard.getvalue()


def plan(models: Path, model: str) -> dict[str, Any]:
    """What `--dry-run` says."""
    from teacher_dump.cli import main

    return _json(main, [*_command(models, model, models / "nowhere"), "--dry-run", "--json"])


def verify(models: Path, out: str, sample: str) -> dict[str, Any]:
    """What `teacher-dump verify` says of some samples."""
    from teacher_dump.cli import main

    return _json(main, ["verify", str(models / out), "--sample", sample, "--json"])


def train(models: Path, family: str) -> dict[str, Any]:
    """Train the family's smallest preset from what it says itself, then from what a larger one says."""
    from student_train.cli import main

    recipe = models / "recipe.toml"
    recipe.write_text(RECIPE)
    run = models / f"run-{family}"
    caches = ["--cache", str(models / f"own-{family}"), "--cache", str(models / f"exact-{family}")]
    chosen = ["--student", str(models / next(iter(presets(family)))), "--recipe", str(recipe)]
    more = ["--out", str(run), "--log-steps", "1", "--no-tensorboard", "--micro-batch", "1", "--json"]
    summary = _json(main, [*caches, *chosen, *more])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"summary": summary, "lines": lines, "model": str(run / "model")}


def reload(models: Path, family: str) -> dict[str, Any]:
    """The saved student in transformers: its class, weights missing or left over, a token it generates."""
    import torch
    from transformers import AutoModelForImageTextToText

    from common.processor import load_processor

    path = str(models / f"run-{family}" / "model")
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    processor = load_processor(path)
    ids = processor.tokenizer("what is a house?", return_tensors="pt").input_ids
    with torch.inference_mode():
        said = model.generate(ids, max_new_tokens=2, do_sample=False)
    return {
        "class": type(model).__name__,
        "wrong": {name: sorted(keys) for name, keys in report.items() if keys},
        "rows": model.get_output_embeddings().weight.shape[0],
        "new_tokens": said.shape[1] - ids.shape[1],
    }


def _command(models: Path, model: str, out: Path) -> list[str]:
    data = str(models / "photos" / "train.json")
    return ["--model", str(models / model), "--data", data, "--out", str(out), "--topk", "64"]


def _json(main: Any, arguments: list[str]) -> dict[str, Any]:
    heard, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(complaints):
        status = main(arguments)
    assert heard.getvalue(), complaints.getvalue()[-3000:]
    answer: dict[str, Any] = json.loads(heard.getvalue()[heard.getvalue().index("{") :])
    return answer | {"status": status}


def cases_of(family: str) -> list[str]:
    """All cases of a family, in the order in which they build on each other."""
    assert family in families()
    smallest, larger = smallest_and_larger(family)
    return [
        *(f"plan:{preset}" for preset in presets(family)),
        f"dump:{smallest}:own-{family}:own",
        f"dump:{larger}:exact-{family}:exact",
        f"verify:exact-{family}:3",
        f"train:{family}",
        f"reload:{family}",
        f"dump:run-{family}/model:student-{family}:exact",
        f"verify:student-{family}:2",
    ]


def smallest_and_larger(family: str) -> tuple[str, str]:
    """The default student's preset, and the first larger one that is built apart from it."""
    names = list(presets(family))
    apart = [name for name in names[1:] if "same_as" not in presets(family)[name]]
    return names[0], (apart or names)[0]
