"""Every preset through the whole of it, by the real commands, on images of real sizes.

plan       every preset, from its configuration alone     positions as the dump then has them
dump       the smallest in the dtype of its files          all rows of every image
           a larger one in float32                         its rows are transformers' own
train      the smallest, from both caches                  heads padded differently
student    reloaded by transformers, dumped by vLLM        the two still agree
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.cache.reader import CacheReader
from tests.presets.build import build
from tests.presets.facts import facts, families, presets
from tests.presets.job import cases_of, smallest_and_larger
from tests.presets.photos import TALKS, write_photos
from tests.teacher_dump.forked import run_cases

POSITIONS = {
    "llava-onevision": {"photo": 2929, "square": 1485, "tall": 1809},
    "llava-1.5": {"photo": 576, "square": 576, "tall": 576},
    "qwen2.5-vl": {"photo": 391, "square": 144, "tall": 234},
    "qwen3-vl": {"photo": 300, "square": 100, "tall": 176},
}
"""Of the photo 640 × 480, the square 336 × 336, the tall image 240 × 720 pixels."""

NEAR = 0.05
"""Nats; the half-precision arithmetic of a teacher moves its rows by less."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=families())
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def models(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    with_weights = smallest_and_larger(family)
    for preset in presets(family):
        build(preset, directory, weights=preset in with_weights)
    write_photos(directory / "photos")
    return directory


@pytest.fixture(scope="module")
def answers(family: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    out = tmp_path_factory.mktemp("answers")
    (out / f"dump:run-{family}").mkdir()  # a case's answer lies under its name, slashes and all
    return run_cases("tests.presets.job", models, out, cases_of(family))


def test_a_dump_is_whole_and_its_positions_are_those_of_the_images(family, models, answers):
    smallest, larger = smallest_and_larger(family)
    for model, way in ((smallest, "own"), (larger, "exact")):
        status, said = answers(f"dump:{model}:{way}-{family}:{way}")
        assert status == 0, said
        with CacheReader(str(models / f"{way}-{family}")) as cache:
            names = sorted(cache.sample_ids)
            assert cache.manifest.vocab_size == facts(model)["tokens"]
            assert cache.manifest.vocab_rows == facts(model)["head_rows"]
            found = {name: cache.read_record(name).visual for name in POSITIONS[family] if name in names}
        assert names == (["photo", "square"] if way == "own" else sorted(name for name, _, _ in TALKS))
        assert {name: [each.num_positions for each in visual] for name, visual in found.items()} == {
            name: [POSITIONS[family][name]] for name in found
        }
        if way == "own":
            assert all(len(each.topk.positions) == each.num_positions for [each] in found.values())


def test_a_plan_needs_no_weights_and_counts_what_the_dump_then_has(family, models, answers):
    with CacheReader(str(models / f"exact-{family}")) as cache:
        positions = int(cache.num_tokens.sum())
    for preset in presets(family):
        planned = answers(f"plan:{preset}")
        assert planned["status"] == 0
        assert planned["positions"] == positions
        assert planned["dtype"] == facts(preset)["dtype"]
        assert planned["bad_samples"]["by_reason"] == {}


def test_rows_in_float32_are_those_of_transformers(family, answers):
    exact = answers(f"verify:exact-{family}:3")
    for kind in ("response", "visual"):
        assert exact[kind]["max_logit_error"] < 1e-3
        assert exact[kind]["topk_agreement"] > 0.999


def test_the_smallest_is_near_its_own_rows_and_learns_from_a_larger_head(family, answers):
    """Both heads are padded differently; its own rows were computed in the dtype of its files."""
    lines = answers(f"train:{family}")["lines"]
    assert [line["stage"] for line in lines] == ["dft", "dpt", "sft", "dft"]
    for line in lines:
        assert all(math.isfinite(value) for name, value in line.items() if name.startswith("raw/"))
    for kind in ("raw/response_kl", "raw/visual_kl"):
        assert lines[0][kind] < NEAR
        assert lines[3][kind] > 10 * NEAR


def test_the_saved_student_is_the_hubs_kind_of_checkpoint_again(family, answers):
    smallest = smallest_and_larger(family)[0]
    assert answers(f"reload:{family}") == {
        "class": facts(smallest)["architectures"][0],
        "wrong": {},
        "rows": facts(smallest)["head_rows"],
        "new_tokens": 2,
    }
    status, said = answers(f"dump:run-{family}/model:student-{family}:exact")
    assert status == 0, said
    checked = answers(f"verify:student-{family}:2")
    for kind in ("response", "visual"):
        assert checked[kind]["max_logit_error"] < 1e-3
