"""Two workers, sharing each layer or half of the layers each, give what transformers gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_families
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.test_capture import check_captured, forward_all

FAMILY = "llava_siglip"
CASES = [f"parallel:{FAMILY}:2:1", f"parallel:{FAMILY}:1:2"]


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tiny_families.build(FAMILY, tiny_dir)
    return run_cases("engine_job", tiny_dir, tmp_path_factory.mktemp("parallel"), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["tensor", "pipeline"])
def test_workers_together_equal_transformers(case: str, answers: Callable[[str], Any], tiny_dir: Path):
    """Also M = WᵀW, of which each tensor-parallel worker holds the real rows of its own shard."""
    check_captured(answers(case)["captured"], forward_all(tiny_dir / FAMILY), tiny_dir / FAMILY)
