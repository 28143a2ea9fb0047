"""Which extra of this package installs a missing module."""

from importlib.util import find_spec
from typing import Final

EXTRAS: Final = {
    "accelerate": "student",
    "cryptography": "trust",
    "datasets": "data",
    "huggingface_hub": "hub",
    "jaxtyping": "student",
    "obstore": "store",
    "peft": "lora",
    "ray": "ray",
    "safetensors": "student",
    "tensorboard": "student",
    "torch": "student",
    "torchvision": "student",
    "transformers": "student",
    "vllm": "teacher",
}
"""Module to extra."""

INSTALL_TEACHER: Final = "pip install 'cascache[teacher]' on CUDA machines, 'cascache[teacher-cpu]' elsewhere"
"""What installs a teacher's engine and the libraries that its models need."""


def need_module(module: str) -> None:
    """Fail now, not after minutes of work, if a module is not installed; it is not imported.

    Raises:
        ModuleNotFoundError: As its import would.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def tell_missing_module(error: ModuleNotFoundError, *, teacher: bool = False) -> str | None:
    """One line about a module that the base installation lacks, for a command line.

    Args:
        error: What the import raised.
        teacher: Whether the command runs teachers, whose extras install the models' libraries too.

    Returns:
        The line, or None when no extra installs the module: then the installation is broken.
    """
    module = (error.name or "").split(".")[0]
    extra = EXTRAS.get(module)
    if extra is None:
        return None
    cure = f"pip install 'cascache[{extra}]'"
    if teacher and extra in ("student", "teacher"):
        cure = INSTALL_TEACHER
    return f"this needs {module}, which is not installed; {cure}"
