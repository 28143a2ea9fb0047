"""Whether this machine can hold the teacher, checked before anything is loaded.

    files of the teacher ──> bytes per device ──> GPUs (nvidia-smi), or main memory and cores

Only certain failures are refused: the weights, keys and values of one longest sample, a chunk of logits. vLLM
measures the rest when it starts.
"""

from collections.abc import Sequence
from dataclasses import replace

from common.devices import Device, driver_tool, find_devices, free_memory, num_cores, vllm_build
from common.errors import ConfigError
from common.model_memory import DTYPE_BYTES, ENGINE_BYTES, GIB, GPU_SHARE, Need, fitting_share, model_need
from common.models import PRESETS
from teacher_dump.config import DumpConfig
from teacher_dump.teacher import Teacher

_QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5, "experts_int8": 1.0}
"""Bytes per weight where vLLM quantises as it loads."""
_PARALLEL = (2, 4, 8, 16, 32)


def check_machine(config: DumpConfig, teacher: Teacher, *, max_len: int) -> None:
    """Refuse an engine that this machine cannot hold.

    Nothing is refused where the devices are elsewhere (a Ray cluster, vLLM builds for neither CUDA nor CPUs)
    or cannot be queried.

    Args:
        config: The settings.
        teacher: With its weights.
        max_len: Longest sequence.

    Raises:
        ConfigError: More devices or cores are asked for than there are, or they are too small.
        EngineError: The GPUs' driver does not answer.
    """
    build = vllm_build()
    if build is None or config.ray is not None or "rocm" in build or "xpu" in build:
        return
    if "cpu" in build:
        _check_cpu(config, teacher, max_len)
    elif driver_tool() is not None:
        _check_gpus(config, teacher, max_len, find_devices())


def engine_need(config: DumpConfig, teacher: Teacher, max_len: int) -> Need:
    """Bytes of one engine, over all its devices.

    Raises:
        ConfigError: A file of the teacher cannot be read.
    """
    need = model_need(teacher.path, dtype=teacher.dtype, positions=max_len + 1, weights=0)
    arguments = config.engine_arguments
    item = _QUANTIZED_BYTES.get(config.quantization or "")
    weights = need.weights * (item / DTYPE_BYTES[teacher.dtype]) if item else float(need.weights)
    devices = config.tensor_parallel * config.pipeline_parallel
    weights -= _number(config, "cpu_offload_gb", 0) * GIB * devices
    kv = need.kv // 2 if str(arguments.get("kv_cache_dtype", "")).startswith("fp8") else need.kv
    return replace(need, weights=max(0, round(weights)), kv=kv)


def _check_gpus(config: DumpConfig, teacher: Teacher, max_len: int, devices: Sequence[Device]) -> None:
    each, engines = config.tensor_parallel * config.pipeline_parallel, config.workers
    if each * engines > len(devices):
        raise ConfigError(
            f"{_wanted(config)} need {each * engines} GPUs, {_found(devices)} here; ask for fewer, "
            "or check CUDA_VISIBLE_DEVICES"
        )
    share = _number(config, "gpu_memory_utilization", GPU_SHARE)
    used = devices[: each * engines]
    rooms = [_room(device, share) for device in used]
    known = [room for room in rooms if room is not None]
    need = engine_need(config, teacher, max_len)
    if known and need.per_device(each) > min(known):
        smallest = used[rooms.index(min(known))]
        raise ConfigError(
            f"{teacher.ref.name} does not fit GPU {smallest.index} ({smallest.name}): found "
            f"{_gib(min(known))} to use there, wanted {_gib(need.per_device(each))} ({_parts(need, each)}); "
            f"{_cures(config, teacher, need, min(known), len(devices))}"
        )
    for device in used:
        _check_shared(device, share, need.per_device(each))


def _check_shared(device: Device, share: float, need: int) -> None:
    """VLLM does not start where less is free than the share that it may take, however little it needs."""
    free, total = device.free_bytes, device.total_bytes
    if free is None or not total or free >= share * total:
        return
    lower = fitting_share(free, total)
    cure = f"--engine-arg gpu_memory_utilization={lower:g}, or " if lower * total >= need else ""
    raise ConfigError(
        f"GPU {device.index} ({device.name}) is in use: found {_gib(free)} of {_gib(total)} free, wanted "
        f"{_gib(share * total)}, the share of {share:g} that vLLM reserves (this teacher needs {_gib(need)} "
        f"there); use {cure}a GPU that nothing else uses"
    )


def _check_cpu(config: DumpConfig, teacher: Teacher, max_len: int) -> None:
    each, cores = config.tensor_parallel * config.pipeline_parallel, num_cores()
    if each > cores:
        raise ConfigError(
            f"{_wanted(config)} need {each} cores, {cores} are here; lower these flags, or omit them"
        )
    need = engine_need(config, teacher, max_len)
    wanted, found = config.workers * (need.weights + ENGINE_BYTES), free_memory()
    if wanted > found:
        raise ConfigError(
            f"{teacher.ref.name} does not fit main memory: found {_gib(found)} free, wanted {_gib(wanted)} "
            f"({config.workers} × weights of {_gib(need.weights)} in {teacher.dtype}); "
            f"{_smaller(teacher, found)}fewer --workers, or --dtype bfloat16"
        )


def _number(config: DumpConfig, name: str, default: float) -> float:
    return float(config.engine_arguments.get(name, default))


def _wanted(config: DumpConfig) -> str:
    return (
        f"--workers {config.workers} × --tensor-parallel {config.tensor_parallel} × "
        f"--pipeline-parallel {config.pipeline_parallel}"
    )


def _found(devices: Sequence[Device]) -> str:
    return "no GPU is" if not devices else "1 GPU is" if len(devices) == 1 else f"{len(devices)} GPUs are"


def _room(device: Device, share: float) -> int | None:
    """Bytes that an engine may use there."""
    if device.free_bytes is None or device.total_bytes is None:
        return None
    return min(device.free_bytes, round(share * device.total_bytes))


def _parts(need: Need, devices: int) -> str:
    weights, kv = (_gib(part / devices) for part in (need.weights, need.kv))
    return (
        f"weights {weights}, keys and values of one sample {kv}, logits {_gib(need.logits)}, "
        f"the engine {_gib(ENGINE_BYTES)}"
    )


def _cures(config: DumpConfig, teacher: Teacher, need: Need, room: int, num_devices: int) -> str:
    """What would fit, most faithful to the settings first."""
    cures = []
    stages = config.pipeline_parallel
    enough = [each for each in _PARALLEL if need.per_device(each * stages) <= room]
    if enough and enough[0] * stages * config.workers <= num_devices:
        cures.append(f"--tensor-parallel {enough[0]}")
    if need.per_device(1) - need.kv <= room:
        cures.append("a smaller --max-len")
    if config.quantization is None:
        cures.append("--quantization fp8 (a coarser teacher)")
    if enough and not cures[0].startswith("--tensor"):
        cures.append(f"{enough[0]} such GPUs and --tensor-parallel {enough[0]}")
    return f"what would fit: {_smaller(teacher, room)}{', or '.join(cures) or 'a larger GPU'}"


def _smaller(teacher: Teacher, room: int) -> str:
    """The largest preset of the family whose weights leave a fifth of the room."""
    mine = PRESETS.get(teacher.ref.name)
    item = DTYPE_BYTES[teacher.dtype]
    fitting = [
        preset
        for preset in PRESETS.values()
        if preset.family == teacher.ref.family
        and preset.size * 1e9 * item <= 0.8 * room
        and (mine is None or preset.size < mine.size)
    ]
    best = max(fitting, key=lambda preset: preset.size, default=None)
    return f"--model {best.name}, " if best is not None else ""


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB"
