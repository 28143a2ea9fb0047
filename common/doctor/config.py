"""Settings of `cascache doctor`: those of a dump that matter to it, and its own."""

from typing import Any, Literal

from pydantic import Field, field_validator

from common.engine_arguments import read_engine_arguments
from common.processor import ProcessorOptions


class DoctorConfig(ProcessorOptions):
    """Check whether this machine can dump a teacher and train a student; measure both on a few samples."""

    model: str = "tiny"
    """Teacher: a preset, a model directory, or a hub id."""
    student: str | None = None
    """Student; the smallest preset of the teacher's family by default."""
    data: str = "shapes"
    """The samples, in any format of teacher-dump."""
    image_root: str | None = None
    """Directory that relative image paths start from."""
    out: str = "zarr"
    """Where the level would be written: its free space is checked, and a small cache is written beside it."""
    cache: str | None = None
    """Cache for the student's step where no teacher runs here; targets are made up without one."""
    keep: str | None = None
    """Directory to keep the small cache in; it is deleted by default."""
    quick: bool = False
    """Check only the host, the template and the image settings: no model is loaded."""
    topk: int = Field(64, ge=1, le=1 << 20)
    """Tokens kept per position."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in; auto takes what its weights are in."""
    head_dtype: Literal["float32", "auto", "bfloat16", "float16"] = "float32"
    """What the head's product is computed in, as for teacher-dump."""
    max_len: int = Field(16384, ge=2)
    """Longest sequence dumped."""
    max_num_seqs: int = Field(64, ge=1)
    """Samples computed at a time."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices that each layer is spread over."""
    threads: int = Field(4, ge=1)
    """Threads that read images and tokenise ahead of the engine."""
    engine_arg: tuple[str, ...] = ()
    """Any other vLLM engine argument as key=value; may be given several times."""
    any_vllm: bool = False
    """Try a vLLM release that was not tested."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the student's step, as for student-train."""
    compare: int = Field(8, ge=1)
    """Samples compared with transformers."""
    samples: int = Field(32, ge=1)
    """Samples that speeds are measured on."""
    time_limit: float = Field(1800, gt=0)
    """Seconds after which the teacher's or the student's checks are stopped."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the random choice of samples."""
    json_: bool = Field(False, alias="json")
    """Print one JSON document instead of the table."""

    @field_validator("engine_arg")
    @classmethod
    def _check_engine_arguments(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        read_engine_arguments(pairs)
        return pairs


def to_flags(config: DoctorConfig) -> list[str]:
    """The command line that passes every setting to a child process."""
    flags: list[str] = []
    for name, value in config.model_dump(by_alias=True).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            flags += [text for each in value for text in (flag, str(each))]
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def shared_settings(config: DoctorConfig, model: Any) -> dict[str, Any]:
    """Values of the settings that another command's model has too, by name."""
    found = config.model_dump(by_alias=False, exclude={"out", "json_", "data"})
    return {name: value for name, value in found.items() if name in model.model_fields} | {
        "data": config.data
    }
