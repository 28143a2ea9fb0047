"""The model card: which caches, which recipe, which data made a student."""

from typing import Any

from common.cache.layout import identity_sha256
from student_train.plan import Plan


def model_card(plan: Plan, results: dict[str, Any] | None = None) -> str:
    """Return the README.md of a finished student.

    Args:
        plan: The run.
        results: Metrics of the last logged step, if any.
    """
    return "\n".join([_header(plan), _levels(plan), _stages(plan), _record(plan, results or {}), ""])


def _header(plan: Plan) -> str:
    base = plan.student.path_or_id if plan.student.revision else plan.student.name
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {base}
tags: [cascache, distillation]
---

# {plan.student.name}, distilled

Trained with cascache from cached teacher knowledge; no teacher ran during training.
Load it with `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor`, or serve it with vLLM.
"""


def _levels(plan: Plan) -> str:
    rows = []
    for number, level in enumerate(plan.levels):
        teacher, capture = level.manifest.teacher, level.manifest.capture
        rows.append(
            f"| l{number + 1} | {teacher.model} | {teacher.weights_sha256[:12]} | {teacher.dtype} | "
            f"{capture.topk} / {capture.visual_topk} | {level.cache.num_samples} | "
            f"{identity_sha256(level.manifest)} |"
        )
    return "\n".join(
        [
            "## Caches\n",
            "| level | teacher | weights | dtype | top-k response / visual | samples | identity |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _stages(plan: Plan) -> str:
    rows = []
    for each in plan.stages:
        terms = " + ".join(f"{weight:g} {term}" for term, weight in each.stage.terms.items())
        trains = " + ".join(each.stage.trains)
        rows.append(
            f"| {each.name} | {trains} | {terms} | {each.stage.learning_rate:g} | {each.num_steps} | "
            f"{each.stage.size} | {each.sampler.num_samples} |"
        )
    head = (
        "| stage | trains | terms | learning rate | steps | batch | samples |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join(["## Recipe\n", head, *rows, ""])


def _record(plan: Plan, results: dict[str, Any]) -> str:
    lines = [f"Seed {plan.config.seed}, precision {plan.config.precision}."]
    lines += [f"Note: {note}." for note in plan.notes]
    lines += [f"Last {name}: {value:.4g}." for name, value in results.items() if isinstance(value, float)]
    return "\n".join(["## Record\n", *lines])
