"""Whether vLLM's rows are what transformers computes, on the same device, in the same dtype.

    records (not encoded yet) ──compare──> transformers: logits, states of the same ids and images

A teacher that does not see its image, a template off by a token, or other weights give a divergence far
beyond rounding. Which rounding is allowed depends on the dtype:

    float32    kernels sum in another order; a GPU may multiply in TF32, with 10 bits of mantissa
    float16    10 bits: half a unit of 16 is 2^-6 nat, and every layer adds its share
    bfloat16   7 bits: half a unit of 16 is 2^-4 nat, likewise
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.doctor.check import Check, Finding
from common.doctor.reporter import Reporter
from common.errors import ConfigError
from common.record import Record
from schemas.manifest import Manifest
from teacher_dump.audit import CHUNK_ROWS, ImageTally, Tally
from teacher_dump.placement import choose_device, free_bytes, needed_bytes
from teacher_dump.reference import Reference
from teacher_dump.teacher import Teacher

if TYPE_CHECKING:
    from PIL.Image import Image


_RELEASE_SECONDS = 30.0


class Tolerance(NamedTuple):
    """Largest differences that pass."""

    mean_kl: float
    """KL(transformers ‖ capture), nats, mean over rows."""
    logit: float
    """Largest difference of a kept logit, nats."""
    factor: float
    """‖R̂ − R̂_A‖ of an image's unit relation, beyond what its rank was chosen for."""


TOLERANCES = {
    "float32": Tolerance(1e-5, 0.02, 1e-2),
    "float16": Tolerance(2e-3, 0.5, 3e-2),
    "bfloat16": Tolerance(2e-2, 4.0, 1e-1),
}
"""By the dtype that the teacher computes in. The codec's own error is 4.6e-5 nats of KL."""


def check_agreement(
    teacher: Teacher,
    records: Sequence[Record],
    pixels: Mapping[str, tuple["Image", ...]],
    *,
    manifest: Manifest,
    reporter: Reporter,
) -> Check:
    """Compute the records again through transformers and compare.

    Args:
        teacher: The same weights.
        records: As the capture gave them.
        pixels: Decoded images by sample id.
        manifest: What was kept.
        reporter: Receives progress.

    Raises:
        ConfigError: transformers cannot load the model.
    """
    try:
        device = find_room(_needed(teacher, manifest, max(len(record.token_ids) for record in records)))
    except ConfigError as error:
        return Check("agreement", "skip", str(error), "room for the model once more, in transformers")
    reporter.progress(f"comparing {len(records)} samples with transformers ({teacher.dtype}, {device})")
    reference = _open_reference(teacher, manifest, device)
    gram = reference.gram() if manifest.relation.of == "logits" else None
    tallies = {"response": Tally(), "visual": Tally()}
    images = ImageTally(gram, cosine=manifest.relation.norm == "cosine")
    for record in records:
        found = reference.states(record.token_ids, pixels[record.sample_id])
        tallies["response"].add(record.response, found, reference)
        for image in record.visual:
            if image.topk is not None:
                tallies["visual"].add(image.topk, found, reference)
        images.add(record, found.float().cpu())
    return judge(
        {name: tally.summary() for name, tally in tallies.items() if tally.rows},
        images.factor_error,
        samples=len(records),
        dtype=teacher.dtype,
        device=device,
        tolerance=TOLERANCES[teacher.dtype],
    )


def _needed(teacher: Teacher, manifest: Manifest, longest: int) -> int:
    return needed_bytes(
        teacher.path,
        dtype=teacher.dtype,
        rows=CHUNK_ROWS,
        vocab_size=manifest.vocab_size,
        states=longest * manifest.hidden_size,
    )


def _open_reference(teacher: Teacher, manifest: Manifest, device: str) -> Reference:
    return Reference(
        teacher.path,
        teacher.processor,
        vocab_size=manifest.vocab_size,
        dtype=teacher.dtype,
        head_dtype=manifest.teacher.head_dtype or teacher.dtype,
        device=device,
    )


def find_room(needed: int) -> str:
    """The device that the model is loaded on once more; `auto` for all GPUs together.

    Initialises CUDA, so call it only after the last engine has stopped.

    Raises:
        ConfigError: Nothing holds it.
    """
    until = time.monotonic() + _RELEASE_SECONDS
    while True:
        free = free_bytes()
        roomy = any(size >= needed for name, size in free.items() if name != "cpu")
        if roomy or free.keys() == {"cpu"} or time.monotonic() > until:
            return choose_device(needed, free, "auto")
        time.sleep(1)  # the engine's processes may still be releasing memory


def judge(
    found: Mapping[str, Mapping[str, float]],
    factor_error: float,
    *,
    samples: int,
    dtype: str,
    device: str,
    tolerance: Tolerance,
) -> Check:
    """Differences against what the dtype allows.

    Args:
        found: `Tally.summary()` by kind of rows.
        factor_error: Largest of the images.
        samples: How many were compared.
        dtype: What the teacher computes in.
        device: Where it was computed again.
        tolerance: What passes.
    """
    kl = max((each["kl_mean_nats"] for each in found.values()), default=0.0)
    logit = max((each["max_logit_error"] for each in found.values()), default=0.0)
    normaliser = max((each["max_logsumexp_error"] for each in found.values()), default=0.0)
    rows = sum(each["rows"] for each in found.values())
    agreed = min((each["topk_agreement"] for each in found.values()), default=1.0)
    values: dict[str, Any] = {
        "samples": samples,
        "dtype": dtype,
        "device": device,
        "kinds": {kind: dict(each) for kind, each in found.items()},
        "max_factor_error": factor_error,
        "tolerance": tolerance._asdict(),
    }
    said = (
        f"{samples} samples, {rows:,.0f} rows ({dtype}, {device}): mean KL {kl:.1e} nats, logits within "
        f"{logit:.1e}, normaliser within {normaliser:.1e}, {agreed:.2%} of the kept ids agree, "
        f"relation within {factor_error:.1e}"
    )
    wanted = (
        f"mean KL at most {tolerance.mean_kl:g}, logits within {tolerance.logit:g}, relation within "
        f"{tolerance.factor:g}"
    )
    finding = Finding("agreement", said, wanted, values)
    far = (
        kl > tolerance.mean_kl or max(logit, normaliser) > tolerance.logit or factor_error > tolerance.factor
    )
    if far or not kl >= 0:
        return finding.fails(
            "do not dump: vLLM computes this model wrongly. Report it with --json; try --dtype float32 "
            "and --engine-arg enforce_eager=true to see whether precision or a kernel is the cause"
        )
    return finding.passes()
