"""The same parts as a Ray Data job: one engine per actor, on one machine or over a cluster.

    unsealed parts ──data set──> PartActor (engine, writer) ──> sealed part, or the error in words
                                 PartActor (engine, writer) ──>

Ray restarts lost actors and repeats the part they were in; a part that two actors wrote is sealed once.
The driver computes nothing: it reads seals, counts quarantined samples and stops the job when there are
too many. Every machine must reach data and cache by the same path.

On CPUs each actor binds itself to cores of its own. Which ones is settled by locks on files, which the
kernel releases when an actor dies, so that its successor takes its place.
"""

import fcntl
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.cache.layout import identity_sha256
from common.cache.writer import CacheWriter
from common.data.open import open_source
from common.errors import CascacheError, ConfigError, EngineError, EngineStopped
from common.models import resolve_model
from schemas.manifest import Manifest
from teacher_dump.attempts import AttemptLog, attempts_place
from teacher_dump.config import DumpConfig
from teacher_dump.environment import prepare_environment
from teacher_dump.level import engine_settings, longest, plan_dump
from teacher_dump.parts import make_capture, write_part
from teacher_dump.plan import Part
from teacher_dump.prompts import Preparer
from teacher_dump.public import choose_engine
from teacher_dump.teacher import Teacher, find_teacher

_OBJECT_STORE_BYTES = 128 * 2**20
_MOST_RESTARTS = 16
"""Times that Ray starts one actor again after its process died."""
_MOST_RETRIES = 5
"""Times that one part is tried again after its actor's process died; after `CAREFUL_AFTER` of them
the engine gets a process of its own."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


def dump_parts(
    config: DumpConfig,
    manifest: Manifest,
    teacher: Teacher,
    todo: list[Part],
    *,
    say: Callable[[str], None],
) -> Iterator[int]:
    """Have every part of `todo` written by `config.workers` actors.

    Args:
        config: The settings; `out` is decided.
        manifest: The level's identity.
        teacher: Found by the driver.
        todo: Parts that are not sealed.
        say: Takes one line for the user.

    Yields:
        Index of each part once it is sealed, in whatever order they are done.

    Raises:
        ConfigError: Ray is missing, or there is no cluster at that address.
        EngineError: An actor's engine does not start.
        CascacheError: What an actor met otherwise, in its words.
    """
    ray = _start(config)
    try:
        cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
        share = max(1, cores // config.workers)
        needs = config.tensor_parallel * config.pipeline_parallel
        if gpus and gpus < needs * config.workers:
            raise ConfigError(
                f"--workers {config.workers} with {needs} GPUs each need {needs * config.workers}, the Ray "
                f"cluster has {gpus}; ask for fewer --workers"
            )
        data = ray.data.from_items([{"part": part.index} for part in todo], override_num_blocks=len(todo))
        with warnings.catch_warnings():
            # Ray 2.60 wants named parameters; for restarts and retries, unbounded by default, it has none.
            warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
            done = data.map_batches(
                PartActor,
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=config.workers, max_tasks_in_flight_per_actor=1),
                fn_constructor_kwargs={
                    "config": _portable(config, teacher).model_dump_json(by_alias=True),
                    "manifest": manifest.model_dump_json(),
                    "attempts": str(attempts_place(config.out)),
                    "cores": 0 if gpus else share,
                },
                num_cpus=1 if gpus else share,
                num_gpus=needs if gpus else 0,
                max_restarts=_MOST_RESTARTS,
                max_task_retries=_MOST_RETRIES,
            )
        for row in done.iter_rows():
            for line in str(row["said"]).splitlines():
                say(line)
            if row["error"]:
                raise _ERRORS.get(row["kind"], EngineError)(str(row["error"]))
            yield int(row["part"])
    except ray.exceptions.RayError as error:
        raise EngineStopped(_lost(error)) from error
    finally:
        ray.shutdown()


def _lost(error: Exception) -> str:
    """The message when Ray gave up."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"Ray lost a worker more than {_MOST_RETRIES} times in one part, or one of them {_MOST_RESTARTS} "
        f"times: {first}; a machine out of memory kills workers (fewer --workers, smaller --max-num-seqs); "
        "run the same command again to resume"
    )


def _start(config: DumpConfig) -> Any:
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"--workers and --ray need Ray, which does not import here ({error}); pip install 'cascache[ray]'"
        ) from error
    local = config.ray is None
    cores = len(os.sched_getaffinity(0))
    own = {
        "num_cpus": max(cores, config.workers),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    try:
        ray.init(
            address="local" if local else config.ray,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **(own if local else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {config.ray or 'this machine'}: {error}; check --ray"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


_ERRORS = {each.__name__: each for each in (*CascacheError.__subclasses__(), EngineStopped)}


def _portable(config: DumpConfig, teacher: Teacher) -> DumpConfig:
    """The settings with paths that hold in another working directory."""
    local = teacher.ref.revision is None
    return config.model_copy(
        update={
            "model": str(teacher.path) if local else config.model,
            "out": config.out if "://" in config.out else str(Path(config.out).absolute()),
            "chat_template": config.chat_template and str(Path(config.chat_template).expanduser().absolute()),
        }
    )


class PartActor:
    """Lives in a Ray worker: owns an engine and writes whole parts."""

    def __init__(self, config: str, manifest: str, attempts: str, cores: int) -> None:
        """Start the engine; an error is kept and raised by the first part.

        Args:
            config: `DumpConfig` as JSON.
            manifest: `Manifest` as JSON.
            attempts: Directory of the `AttemptLog`.
            cores: Cores to bind to, or 0 for none.
        """
        prepare_environment()
        self._problem: CascacheError | None = None
        self._held = bind_cores(cores) if cores else None
        self._said: list[str] = []
        identity = Manifest.model_validate_json(manifest)
        self._attempts = AttemptLog(Path(attempts), identity_sha256(identity))
        try:
            self._open(DumpConfig.model_validate_json(config), identity)
        except CascacheError as error:
            self._problem = error

    def _open(self, config: DumpConfig, manifest: Manifest) -> None:
        assert manifest.data_source is not None, "the dump always says where its data is"
        source = open_source(manifest.data_source.path, image_root=manifest.data_source.image_root)
        teacher = find_teacher(
            resolve_model(config.model), dtype=config.dtype, with_weights=True, options=config
        )
        self._config, self._plan = config, plan_dump(config, source)
        self._preparer = Preparer(
            source, teacher.processor, max_len=longest(config, teacher), asks=config.teacher_answers
        )
        self._writer = CacheWriter.open(config.out, manifest)
        settings = engine_settings(config, teacher, manifest.capture)
        deadly = self._attempts.deadly(part.index for part in self._plan.todo(self._writer.sealed))
        if deadly:
            settings = replace(settings, inside=False)
            self._said.append(f"workers died in part {deadly[0]}: the engine gets a process of its own")
        engine = choose_engine(settings).__enter__()
        self._capture = make_capture(engine, config, teacher, manifest.capture, self._said.append)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Write the parts of a batch; an error is returned in the row of its part."""
        errors = [self._dump(int(part)) for part in batch["part"]]
        return {
            "part": np.asarray(batch["part"]),
            "kind": np.array([type(error).__name__ if error else "" for error in errors]),
            "said": np.array(["\n".join(self._take_said())] * len(errors)),
            "error": np.array([str(error) if error else "" for error in errors]),
        }

    def _dump(self, part: int) -> CascacheError | None:
        if self._problem is not None:
            return self._problem
        try:
            if part not in self._writer.sealed:
                write_part(
                    self._writer,
                    self._plan.part(part),
                    self._capture,
                    self._preparer,
                    threads=self._config.threads,
                    attempts=self._attempts,
                )
        except CascacheError as error:
            return error
        return None

    def _take_said(self) -> list[str]:
        said, self._said[:] = list(self._said), []
        return said


def bind_cores(count: int) -> IO[str]:
    """Bind this process to `count` cores that no other actor on this machine holds.

    Returns:
        The locked file; the cores are held until it is closed or the process ends.
    """
    cores = sorted(os.sched_getaffinity(0))
    place = Path(tempfile.gettempdir()) / f"cascache-cores-{os.getuid()}"
    place.mkdir(exist_ok=True)
    for slot in range(max(1, len(cores) // count)):
        file = (place / f"{count}-{slot}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        mine = cores[slot * count : (slot + 1) * count]
        os.sched_setaffinity(0, mine)
        os.environ["OMP_NUM_THREADS"] = str(count)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))
        return file
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Path(os.devnull).open("w")  # more actors than cores: the system shares them out
