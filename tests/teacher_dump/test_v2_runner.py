"""vLLM's V2 model runner, the one of GPUs, run on a CPU: the capture gives what transformers gives.

Triton's interpreter stands in for its compiler; see scripts/triton_cpu_shim.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_families
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.test_capture import check_captured, forward_all

FAMILY = "llava_siglip"
CASES = [f"capture:{FAMILY}:{batched}" for batched in ("4096", "128")]
TRITON = Path(sys.prefix) / "triton"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TRITON / "sitecustomize.py").exists(), reason=f"no Triton in {TRITON}; scripts/setup.sh puts it"
    ),
]


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tiny_families.build(FAMILY, tiny_dir)
    return run_cases("engine_job", tiny_dir, tmp_path_factory.mktemp("v2"), CASES, beside=TRITON)


@pytest.mark.parametrize("case", CASES, ids=["whole", "chunked"])
def test_equals_transformers_in_float32(case: str, answers: Callable[[str], Any], tiny_dir: Path):
    found = answers(case)
    assert found["runner"] == "V2"
    check_captured(found["captured"], forward_all(tiny_dir / FAMILY), tiny_dir / FAMILY)
