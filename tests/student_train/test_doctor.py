"""Made-up targets are well formed, and losses that are not the defined ones fail."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.cache.reader import CacheReader
from common.doctor.config import DoctorConfig
from common.models import TINY, resolve_model
from student_train.batch import Batch
from student_train.doctor.losses import judge
from student_train.doctor.stand_in import write_stand_in


@pytest.mark.parametrize("topk", [8, 64, 1000])
def test_made_up_targets_are_distributions_on_the_datas_own_prompts(shapes: Path, tmp_path: Path, topk: int):
    config = DoctorConfig(data=str(shapes), topk=topk)
    student = resolve_model(str(TINY / "tiny-student"))
    with CacheReader(str(write_stand_in(student, config, tmp_path / "cache", num_samples=5))) as cache:
        kept = min(topk, cache.manifest.vocab_size - 1)
        assert cache.num_samples == 5
        for index in range(5):
            record = cache.read_record(index)
            for rows in (record.response, *(image.topk for image in record.visual)):
                assert rows is not None
                assert rows.token_ids.shape == (len(rows.positions), kept)
                assert all(len(set(ids)) == kept for ids in rows.token_ids.tolist())
                assert rows.token_ids.max() < cache.manifest.vocab_size
                mass = np.exp(rows.logprobs).sum(1) + np.exp(rows.log_tail[:, 0])
                np.testing.assert_allclose(mass, 1, atol=0.1)  # the codec's steps of 0.06 nat
            assert [image.num_positions for image in record.visual] == [36]
            assert {span.kind for span in record.spans} == {"image", "prompt", "response"}


def empty_batch() -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch({}, (), none, none, None, none, None, (), 0)


@pytest.mark.parametrize(
    ("fused", "eager", "status"),
    [
        (1e-6, 0.0, "pass"),
        (1e-2, 1e-2, "pass"),
        (1e-3, 1e-6, "fail"),
        (3e-2, 1e-2, "fail"),
        (float("nan"), 1e-2, "fail"),
    ],
)
def test_fused_losses_farther_from_the_truth_than_rounding_fail(fused: float, eager: float, status: str):
    names = ("loss", "hidden", "head")
    apart = {
        "fused_from_float64": dict.fromkeys(names, fused),
        "eager_from_float64": dict.fromkeys(names, eager),
        "fused_from_eager": dict.fromkeys(names, 0.0),
    }
    assert judge(apart, loss=1.0, batch=empty_batch(), precision="bf16").status == status
