"""An audit's teacher goes where it fits, or nowhere, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigError
from schemas.manifest import Encoding
from teacher_dump.audit import allowed_kl
from teacher_dump.placement import choose_device, free_bytes, needed_bytes
from tests.common.cache.records import make_manifest

GB = 10**9
TWO = {"cuda:0": 80 * GB, "cuda:1": 80 * GB, "cpu": 500 * GB}


@pytest.mark.parametrize(
    ("needed", "free", "asked", "chosen"),
    [
        (16, TWO, "auto", "cuda:0"),
        (150, TWO, "auto", "auto"),
        (290, TWO, "auto", "cpu"),
        (16, {"cuda:0": 8 * GB, "cuda:1": 80 * GB, "cpu": 0}, "auto", "cuda:1"),
        (16, {"cpu": 24 * GB}, "auto", "cpu"),
        (16, TWO, "cpu", "cpu"),
        (16, TWO, "cuda", "cuda:0"),
        (150, TWO, "cuda", "auto"),
        (16, TWO, "cuda:1", "cuda:1"),
    ],
)
def test_the_narrowest_place_that_holds_it(needed: int, free: dict[str, int], asked: str, chosen: str):
    assert choose_device(needed * GB, free, asked) == chosen


@pytest.mark.parametrize(
    ("needed", "free", "asked", "words"),
    [
        (290, {"cpu": 24 * GB}, "auto", r"about 290.0 GB, free: cpu 24.0 GB"),
        (600, TWO, "auto", r"cuda:0 80.0 GB, cuda:1 80.0 GB, cpu 500.0 GB"),
        (100, TWO, "cuda:1", r"free: cuda:1 80.0 GB"),
        (1, {"cpu": 24 * GB}, "cuda", "this machine has cpu"),
        (1, TWO, "cuda:7", "this machine has cuda:0, cuda:1, cpu"),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_is_free(
    needed: int, free: dict[str, int], asked: str, words: str
):
    with pytest.raises(ConfigError, match=words):
        choose_device(needed * GB, free, asked)


def test_half_the_width_takes_half_the_memory(tiny_family: Any):
    path: Path = tiny_family("llava_siglip")
    numbers = sum(each.numel() for each in load_file(path / "model.safetensors").values())
    sizes = {
        dtype: needed_bytes(path, dtype=dtype, rows=1, vocab_size=1, states=0)
        for dtype in ("float32", "bfloat16")
    }
    assert sizes["float32"] == pytest.approx(1.1 * 4 * numbers, rel=1e-3)
    assert sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2, rel=1e-3)


def test_free_memory_is_some_and_not_more_than_there_is():
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes()["cpu"] <= total
    assert torch.cuda.is_available() == (len(free_bytes()) > 1)


def test_a_wider_dtype_and_a_finer_encoding_allow_less():
    manifest = make_manifest(num_samples=1)
    half = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"dtype": "bfloat16"})})
    coarse = manifest.model_copy(update={"encoding": Encoding(logit_step=1.0)})
    assert allowed_kl(manifest, "float32") < 1e-3
    assert allowed_kl(manifest, "float32") < allowed_kl(half, "bfloat16") < 0.05
    assert allowed_kl(coarse, "float32") > 0.1
