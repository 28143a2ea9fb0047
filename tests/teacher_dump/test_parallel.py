"""Two workers, sharing each layer or half of the layers each, give what transformers gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.chat import load_processor
from common.relation import relation
from common.spans import response_rows
from tests import tiny_families
from tests.teacher_dump.examples import prepare, samples
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.test_capture import TOLERANCE, check_factor, check_rows, forward_all

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
    processor, expected = load_processor(str(tiny_dir / FAMILY)), forward_all(tiny_dir / FAMILY)
    for example, found in zip(samples(), answers(case)["captured"], strict=True):
        assert found.problem is None, f"{found.key}: {found.problem}"
        prompt, wanted = prepare(processor, example).prompt, expected[example.sample_id]
        check_rows(found.response, wanted["logits"][response_rows(prompt.spans)])
        for index, image in found.images.items():
            span = slice(prompt.images[index].start, prompt.images[index].stop)
            check_rows(image.rows, wanted["logits"][span])
            assert np.abs(image.hidden - wanted["hidden"][span].numpy()).max() <= TOLERANCE
            check_factor(image, relation(wanted["hidden"][span], wanted["gram"]))
