"""Who the teacher is, before it is loaded: files, processor, sizes, dtype.

Hub models are located (and, when needed, downloaded) here, so that the engine and the processor read
the same snapshot and the cache can name its commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint_files import check_checkpoint
from common.devices import find_devices, vllm_build
from common.errors import ConfigError, EngineError
from common.fingerprint import config_sha256, weights_sha256
from common.models import ModelRef
from common.processor import ProcessorOptions, load_processor
from common.weights_digest import weight_files
from schemas.manifest import Manifest, TeacherIdentity

_CPU_FLOPS = 2e10
_GPU_FLOPS = 1.5e14
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher on disk."""

    ref: ModelRef
    """What the user asked for."""
    path: Path
    """Directory with its files."""
    revision: str | None
    """Commit of a hub model."""
    processor: Any
    """Its transformers processor."""
    model_type: str
    """`config.model_type`."""
    dtype: str
    """What it will compute in."""
    vocab_rows: int
    """Rows of its head."""
    hidden_size: int
    """D."""
    max_positions: int
    """Longest sequence it takes."""

    @property
    def vocab_size(self) -> int:
        """Real tokens."""
        return min(len(self.processor.tokenizer), self.vocab_rows)

    def head_dtype(self, asked: str) -> str:
        """What its head computes in: as asked, or for `auto` what the rest computes in."""
        return self.dtype if asked == "auto" else asked

    def identity(
        self, quantization: str | None, engine: Mapping[str, str], *, head_dtype: str
    ) -> TeacherIdentity:
        """Which weights answer, and how they are run; hashes every weight file."""
        return TeacherIdentity(
            model=self.ref.name,
            revision=self.revision,
            weights_sha256=weights_sha256(self.path),
            model_type=self.model_type,
            dtype=self.dtype,
            head_dtype=None if head_dtype == self.dtype else head_dtype,
            quantization=quantization,
            config_sha256=config_sha256(self.path),
            engine=dict(engine),
        )

    @property
    def has_weights(self) -> bool:
        """Whether its weights are in its directory, or can be fetched from the hub."""
        return self.ref.revision is not None or bool(weight_files(self.path))

    def rate(self) -> float | None:
        """Positions a second, guessed from the weights' size and the device; None without weights."""
        size = sum(each.stat().st_size for each in self.path.glob("*.safetensors"))
        flops = _GPU_FLOPS if _has_gpu() else _CPU_FLOPS
        return flops / (2 * size / (4 if self.dtype == "float32" else 2)) if size else None


def _has_gpu() -> bool:
    """Whether vLLM would compute on a GPU; torch is not asked, which would initialise CUDA in the driver."""
    try:
        return "cpu" not in (vllm_build() or "") and bool(find_devices())
    except EngineError:  # a dry run needs no driver that works
        return False


def find_teacher(
    ref: ModelRef,
    *,
    dtype: str,
    with_weights: bool,
    options: ProcessorOptions | None = None,
    level: Manifest | None = None,
) -> Teacher:
    """Locate a teacher and read its configuration.

    Args:
        ref: From `resolve_model`.
        dtype: `auto` or a dtype's name.
        with_weights: Whether a hub model's weights must be there too.
        options: How its processor is set.
        level: The level that was dumped with it, if it was.

    Raises:
        ConfigError: It cannot be found, is not whole, or is no vision-language model.
    """
    from transformers import AutoConfig

    path, revision = _locate(ref, with_weights)
    if with_weights or ref.revision is None:
        check_checkpoint(path)
    try:
        config = AutoConfig.from_pretrained(path)
        text = config.get_text_config()
        saved = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32")
        sizes = int(text.vocab_size), int(text.hidden_size), int(text.max_position_embeddings)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no vision-language model that transformers knows: {error}; check --model {ref.name}"
        ) from error
    processor = load_processor(str(path), options=options, level=level)
    chosen = saved.removeprefix("torch.") if dtype == "auto" else dtype
    return Teacher(ref, path, revision, processor, str(config.model_type), chosen, *sizes)


def _locate(ref: ModelRef, with_weights: bool) -> tuple[Path, str | None]:
    if ref.revision is None:
        return Path(ref.path_or_id), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            ref.path_or_id,
            revision=ref.revision,
            allow_patterns=None if with_weights else _SMALL_FILES,
            ignore_patterns=["*.bin", "*.pth", "original/*"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{ref.name} ({ref.path_or_id}) is neither in the Hugging Face cache nor reachable on the hub "
            f"({type(error).__name__}); connect once, or give --model a directory"
        ) from error
    return Path(found), Path(found).name
