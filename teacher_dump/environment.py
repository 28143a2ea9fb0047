"""What every process that dumps needs in its environment before torch is imported."""

import os

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""Set to 1, vLLM's kernels give values that do not depend on what is computed together."""
_DEFAULTS = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # when libraries look for GPUs, CUDA is not initialised here
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def prepare_environment() -> None:
    """Set what is not set yet; what the user set stays."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
