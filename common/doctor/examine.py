"""All checks, in order: the host in this process, everything that loads a library in a process of its own.

    host ──────> prompts ─────────> teacher ───────────────> student
    this one     common.doctor.     teacher_dump.doctor      student_train.doctor
                 prompts            leaves a small cache ──> trains on it

This process imports no library that could initialise a device, so that no child inherits one.
"""

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from common.checkpoint_files import check_checkpoint
from common.devices import Device, free_memory
from common.doctor import host
from common.doctor.check import CHECKS, Check, failure
from common.doctor.child import Say, run_child
from common.doctor.config import DoctorConfig, to_flags
from common.doctor.gpus import look_at_devices
from common.doctor.memory import check_memory
from common.doctor.models import check_hub, find_directory, guess_weights, has_weights, hub_cache
from common.doctor.redact import redact, redact_all
from common.engine_arguments import read_engine_arguments
from common.errors import ConfigError
from common.model_memory import DTYPE_BYTES, GPU_SHARE, Need, model_need
from common.models import ModelRef, resolve_model, smallest_of_family

_DOWNLOAD_MARGIN: Final = 1.2
_PREFIX: Final = "cascache-doctor-"
_SECONDS_OF_PROMPTS: Final = 600.0
_HALVES: Final = {
    "teacher": ("teacher_dump.doctor", ("torch", "vllm", "transformers", "zarr")),
    "student": ("student_train.doctor", ("torch", "transformers", "accelerate", "zarr")),
}


def examine(config: DoctorConfig, *, say: Say, show: Callable[[Check], None]) -> dict[str, Any]:
    """Make every check; returns the document that `--json` prints.

    Args:
        config: The settings.
        say: Takes one line of progress.
        show: Takes each check as it finishes.

    Raises:
        ConfigError: The teacher or the student is no model that is known, or `--keep` is not empty.
    """
    teacher = resolve_model(config.model)
    student = _student(config, teacher)
    _require_empty(config.keep)
    began = time.monotonic()
    checks: list[Check] = []
    for check in _all_checks(config, teacher, student, checks, say):
        checks.append(redacted(check))
        show(checks[-1])
    from common.doctor.document import to_document

    return to_document(config, teacher, student, checks, time.monotonic() - began)


def redacted(check: Check) -> Check:
    """The check without what a bug report must not carry."""
    return replace(
        check,
        found=redact(check.found),
        wanted=redact(check.wanted),
        cure=redact(check.cure),
        values=redact_all(check.values),
    )


def _student(config: DoctorConfig, teacher: ModelRef) -> ModelRef | None:
    if config.student is not None:
        return resolve_model(config.student)
    try:
        return smallest_of_family(teacher.family)
    except ConfigError:
        return None


def _require_empty(keep: str | None) -> None:
    if (
        keep is not None
        and Path(keep).exists()
        and not (Path(keep).is_dir() and not any(Path(keep).iterdir()))
    ):
        raise ConfigError(f"--keep {keep} is not an empty directory; give a new one for the small cache")


def _all_checks(
    config: DoctorConfig, teacher: ModelRef, student: ModelRef | None, made: Sequence[Check], say: Say
) -> Iterator[Check]:
    yield from host.installation_checks(any_vllm=config.any_vllm)
    devices, check = look_at_devices(parallel=config.tensor_parallel)
    yield check
    yield _memory(config, teacher, devices)
    place = Path(config.out) if "://" not in config.out else Path()
    gpu = bool(devices)
    found = {
        each.name: each
        for each in host.host_checks(place, threads=config.threads, workers=config.tensor_parallel, gpu=gpu)
    }
    refs = [ref for ref in (teacher, student) if ref is not None]
    found["hub-cache"] = _hub_cache(refs)
    chosen = student if config.student is None else None
    found["hub"] = check_hub([ref for ref in refs if ref is not chosen], chosen=chosen, quick=config.quick)
    yield from (found[name] for name in CHECKS["host"] if name in found)
    yield from run_child(
        "common.doctor.prompts",
        to_flags(config),
        CHECKS["prompts"],
        seconds=min(config.time_limit, _SECONDS_OF_PROMPTS),
        say=say,
    )
    yield from _halves(config, teacher, student, made, say)


def _halves(
    config: DoctorConfig, teacher: ModelRef, student: ModelRef | None, made: Sequence[Check], say: Say
) -> Iterator[Check]:
    hopeless = "--quick loads no model" if config.quick else blocker(made, CHECKS["prompts"], unmade="images")
    if hopeless:
        yield from _skip("teacher", hopeless)
        yield from _skip("student", hopeless)
        return
    say(_what_is_loaded(config, teacher, student))
    with _Workplace(config) as place:
        inner = config.model_copy(update={"keep": str(place)})
        no_teacher = blocker(made, ("devices", "memory", "hub"))
        yield from _skip("teacher", no_teacher) if no_teacher else _half("teacher", inner, say)
        if student is None:
            yield from _skip(
                "student", f"no preset has family {teacher.family}: name a student with --student"
            )
        else:
            if config.cache is None:
                inner = inner.model_copy(update={"student": student.name})
            yield from _half("student", inner, say)


def blocker(made: Sequence[Check], names: tuple[str, ...], *, unmade: str | None = None) -> str:
    """Which failed check makes the next part pointless; empty when none does.

    Args:
        made: Checks made so far.
        names: Those whose failure blocks it.
        unmade: Only when this later check could not be made either.
    """
    failed = [check.name for check in made if check.status == "fail" and check.name in names]
    came_so_far = unmade is None or any(check.name == unmade and check.status == "skip" for check in made)
    return f"the check {failed[0]} failed: repair that first" if failed and came_so_far else ""


class _Workplace:
    """Directory of the small cache: the user's, or one beside `--out` that is removed."""

    def __init__(self, config: DoctorConfig) -> None:
        self._keep, self._out = config.keep, config.out
        self._made: Path | None = None

    def __enter__(self) -> Path:
        if self._keep is not None:
            place = Path(self._keep)
            place.mkdir(parents=True, exist_ok=True)
            return place
        there = None if "://" in self._out else host.existing(Path(self._out))
        try:
            self._made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=there))
        except OSError:  # already reported by the check `disk`
            self._made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        return self._made

    def __exit__(self, *_: object) -> None:
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)


def _half(part: str, config: DoctorConfig, say: Say) -> Iterator[Check]:
    module, needed = _HALVES[part]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        yield from _skip(part, f"{', '.join(missing)} not installed here: this machine has no {part}")
        return
    yield from run_child(
        module,
        to_flags(config),
        CHECKS[part],
        seconds=config.time_limit,
        say=lambda text: say(f"{part}: {text}"),
    )


def _skip(part: str, why: str) -> Iterator[Check]:
    for name in CHECKS[part]:
        yield Check(name, "skip", why)


def _memory(config: DoctorConfig, teacher: ModelRef, devices: list[Device]) -> Check:
    directory = find_directory(teacher, hub_cache())
    if directory is None:
        return Check("memory", "skip", f"{teacher.name} is not on this machine yet, so its size is not known")
    try:
        need = _need(config, teacher, directory)
    except ConfigError as error:
        return failure("memory", str(error))
    return check_memory(
        teacher.name,
        need,
        devices,
        free_ram=free_memory(),
        parallel=config.tensor_parallel,
        share=float(read_engine_arguments(config.engine_arg).get("gpu_memory_utilization", GPU_SHARE)),
    )


def _need(config: DoctorConfig, teacher: ModelRef, directory: Path) -> Need:
    item = DTYPE_BYTES.get(config.dtype, 2)
    check_checkpoint(directory)
    return model_need(
        directory,
        dtype=config.dtype,
        positions=config.max_len + 1,
        weights=guess_weights(teacher, item),
    )


def _hub_cache(refs: list[ModelRef]) -> Check:
    cache = hub_cache()
    places = [(ref, find_directory(ref, cache)) for ref in refs if ref.revision is not None]
    absent = [ref for ref, place in places if place is None or not has_weights(place)]
    if not absent:
        return Check("hub-cache", "pass", "nothing has to be downloaded")
    wanted = sum(guess_weights(ref, 2) or 0 for ref in absent)
    return host.check_disk("hub-cache", cache, wanted=round(wanted * _DOWNLOAD_MARGIN) or 10 * host.GIB)


def _what_is_loaded(config: DoctorConfig, teacher: ModelRef, student: ModelRef | None) -> str:
    directory = find_directory(teacher, hub_cache())
    size = "size unknown"
    if directory is not None:
        try:
            size = host.size(_need(config, teacher, directory).weights)
        except ConfigError:
            size = "size unknown"
    loads = f"loading teacher {teacher.name} ({size}) in vLLM, then in transformers"
    if student is not None:
        loads += f", then student {student.name}"
    return f"{loads}; --quick loads no model"


def dump_command(config: DoctorConfig) -> str:
    """The dump that these settings are about."""
    parts = ["teacher-dump", "--model", config.model, "--topk", str(config.topk), "--data", config.data]
    if config.tensor_parallel > 1:
        parts += ["--tensor-parallel", str(config.tensor_parallel)]
    return shlex.join([*parts, "--dry-run"])
