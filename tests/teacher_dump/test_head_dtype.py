"""A bfloat16 teacher's head computes in float32: what is kept is what its states give.

The twin is the product of the kept states and the head's bfloat16 weight, in float64.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.record import Record, TopK
from schemas.manifest import Encoding
from teacher_dump.arguments import known_arguments
from teacher_dump.cli import main
from tests import tiny_families
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.head_job import FULL

SMALL = tiny_families.VOCAB
NESTED, OUTER = "llava_siglip", "qwen2_5_vl"
FLOAT32 = [
    f"kept:{NESTED}:float32:{FULL}",
    f"kept:{OUTER}:float32:{FULL}",
    f"kept:qwen3_vl:float32:{SMALL}",
    f"kept:internvl:float32:{SMALL}",
]
BFLOAT16 = f"kept:{NESTED}:bfloat16:{FULL}"
DUMPED = [f"dumped:{family}:bfloat16:{SMALL}" for family in (NESTED, OUTER)]
PUBLIC = f"public:{NESTED}:float32:{SMALL}"
IGNORED = [f"ignored:{family}:{how}:{SMALL}" for family, how in ((NESTED, "rounded"), (OUTER, "widened"))]

NAMES, QUANTISED = f"names:{NESTED}:any:{SMALL}", f"quantised:{NESTED}:any:{SMALL}"
TRITON = Path(sys.prefix) / "triton"

pytestmark = pytest.mark.slow


def build(models: Path, cases: list[str]) -> None:
    """The models of some cases."""
    for case in cases:
        _, family, _, vocab = case.split(":")
        model = tiny_families.build(family, models / vocab, vocab=int(vocab))
        if (family, vocab) == (NESTED, str(FULL)):
            scale_head(model, 0.45)


def scale_head(model: Path, factor: float) -> None:
    """Bring the largest logits down to about 12, once."""
    if (model / "scaled").exists():
        return
    weights = load_file(model / "model.safetensors")
    (name,) = [each for each in weights if each.endswith("lm_head.weight")]
    save_file(weights | {name: weights[name] * factor}, model / "model.safetensors", {"format": "pt"})
    (model / "scaled").touch()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def answers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    cases = [*FLOAT32, BFLOAT16, PUBLIC, *IGNORED, *DUMPED, NAMES, QUANTISED]
    build(models, cases)
    return run_cases("head_job", models, tmp_path_factory.mktemp("kept"), cases)


def head_of(model: Path) -> torch.Tensor:
    """[V, D] the head's weight as a bfloat16 engine has it."""
    weights = load_file(model / "model.safetensors")
    (name,) = [each for each in weights if each.endswith("lm_head.weight")]
    return weights[name].bfloat16()


def worst_error(records: list[Record], head: torch.Tensor) -> float:
    """Largest |Δ| of raw logits and normalisers at image positions from those of the kept states."""
    errors = [0.0]
    for kept, exact in image_rows(records, head):
        found = torch.from_numpy(kept.logprobs + kept.logsumexp[:, :1]).double()
        ids = torch.from_numpy(np.array(kept.token_ids, np.int64))
        errors.append(float((found - exact.gather(-1, ids)).abs().max()))
        normaliser = torch.from_numpy(np.array(kept.logsumexp[:, 0]))
        errors.append(float((normaliser - exact.logsumexp(-1)).abs().max()))
    assert len(errors) > 1
    return max(errors)


def image_rows(records: list[Record], head: torch.Tensor) -> list[tuple[TopK, torch.Tensor]]:
    """Kept rows of every image, and the [P, V] logits that its states give."""
    images = {image.key: image for record in records for image in record.visual}
    rows = []
    for image in images.values():
        assert image.hidden is not None
        assert image.topk is not None
        states = torch.from_numpy(np.array(image.hidden))
        assert torch.equal(states.bfloat16().float(), states), "states of a bfloat16 teacher"
        rows.append((image.topk, states.double() @ head.double().T))
    return rows


def mean_kl(records: list[Record], head: torch.Tensor) -> float:
    """KL(exact ‖ kept) in nats, what is not kept as one bucket, averaged over image positions."""
    found = []
    for kept, logits in image_rows(records, head):
        ids = torch.from_numpy(np.array(kept.token_ids, np.int64))
        exact = logits.log_softmax(-1)
        theirs, ours = exact.gather(-1, ids), torch.from_numpy(np.array(kept.logprobs)).double()
        rest = exact.scatter(-1, ids, float("-inf")).logsumexp(-1)
        tail = torch.from_numpy(np.array(kept.log_tail[:, 0])).double()
        total = torch.cat([ours, tail[:, None]], -1).logsumexp(-1)  # rounded log-probs do not add up to 1
        terms = (theirs.exp() * (theirs - ours)).sum(-1) + rest.exp() * (rest - tail)
        found.append(terms + total)
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("case", FLOAT32)
def test_equals_the_float32_head_on_the_same_states(case: str, answers: Callable[[str], Any], models: Path):
    """Whether the class reads its own configuration or the text model's."""
    _, family, _, vocab = case.split(":")
    found = answers(case)
    assert found["head_dtype"] == "float32"
    assert worst_error(found["records"], head_of(models / vocab / family)) <= 1e-5


def test_a_bfloat16_head_is_far_from_it(answers: Callable[[str], Any], models: Path):
    """Logits in [8, 16) are rounded to sixteenths."""
    error = worst_error(answers(BFLOAT16)["records"], head_of(models / str(FULL) / NESTED))
    assert 0.02 <= error <= 0.03125 + 1e-4


def test_capture_and_codec_together_stay_within_5e_5_nats(answers: Callable[[str], Any], models: Path):
    """At a largest logit of about 12, where a bfloat16 head's steps are as wide as the codec's."""
    head = head_of(models / str(FULL) / NESTED)
    float32, bfloat16 = answers(FLOAT32[0]), answers(BFLOAT16)
    assert mean_kl(float32["cached"], head) <= 5e-5
    assert mean_kl(bfloat16["records"], head) > 1e-5
    assert mean_kl(bfloat16["cached"], head) > 1.5 * mean_kl(float32["cached"], head)


@pytest.mark.parametrize("case", FLOAT32)
def test_the_capture_adds_nothing_to_what_the_codec_loses(
    case: str, answers: Callable[[str], Any], models: Path
):
    """Uniform errors within half a step cost at most step² / 24, whatever the distribution."""
    _, family, _, vocab = case.split(":")
    head = head_of(models / vocab / family)
    assert abs(mean_kl(answers(case)["records"], head)) <= 1e-8
    assert mean_kl(answers(case)["cached"], head) <= Encoding().logit_step ** 2 / 24


def test_prompt_logprobs_come_from_the_same_head(answers: Callable[[str], Any]):
    """Differences of a row's log-probs are no multiples of a bfloat16 step."""
    found = answers(PUBLIC)
    assert found["head_dtype"] == "float32"
    assert found["captured"].problem is None
    gaps = np.diff(found["captured"].response.logprobs.astype(np.float64))
    assert np.mean(np.abs(gaps * 64 - np.round(gaps * 64)) > 1e-3) > 0.9


@pytest.mark.parametrize("case", IGNORED, ids=["rounded", "rounded and widened"])
def test_an_engine_that_does_not_honour_the_dtype_is_refused(case: str, answers: Callable[[str], Any]):
    said = answers(case)
    assert said.startswith("EngineError: vLLM gives logits in bfloat16, the level is to be in float32")
    assert "--head-dtype bfloat16" in said


@pytest.mark.parametrize("case", DUMPED)
def test_a_cache_is_verified_in_its_own_dtype(
    case: str, answers: Callable[[str], Any], models: Path, capsys: pytest.CaptureFixture[str]
):
    """Half the memory of float32 weights, and no farther from the cache."""
    status, heard = answers(case)
    assert status == 0, heard
    cache = str(models / case.rpartition(":")[0].replace(":", "-"))
    found, means = {}, {}
    for dtype in ("auto", "float32"):
        main(["verify", cache, "--sample", "12", "--json", "--dtype", dtype])
        found[dtype] = json.loads(capsys.readouterr().out)
        means[dtype] = max(found[dtype][kind]["kl_mean_nats"] for kind in ("response", "visual"))
    assert found["auto"]["dtype"] == "bfloat16"
    assert found["auto"]["ok"]
    assert means["auto"] <= 2 * means["float32"]
    assert means["auto"] <= found["auto"]["max_kl"] / 3 < 5e-3


def test_names_of_arguments_are_those_of_the_imported_classes(answers: Callable[[str], Any]):
    assert set(answers(NAMES)) <= known_arguments()


@pytest.mark.parametrize("head", ["own", "plain", "excluded"])
def test_a_plain_head_is_found(head: str, answers: Callable[[str], Any]):
    assert answers(QUANTISED)[head] in ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")


@pytest.mark.parametrize(("head", "words"), [("float8", "float8_e4m3fn"), ("scaled", "CompressedTensors")])
def test_a_quantised_head_has_no_gram(head: str, words: str, answers: Callable[[str], Any]):
    """Neither float8, which is a floating type, nor a weight that its method multiplies by scales."""
    said = answers(QUANTISED)[head]
    assert said.startswith("EngineError")
    assert words in said
    assert "--relation-of hidden" in said


def test_two_workers_gather_float32_logits(models: Path, tmp_path: Path):
    case = f"parallel:{NESTED}:float32:{SMALL}"
    build(models, [case])
    found = run_cases("head_job", models, tmp_path, [case])(case)
    assert worst_error(found["records"], head_of(models / str(SMALL) / NESTED)) <= 1e-5


@pytest.mark.skipif(not (TRITON / "sitecustomize.py").exists(), reason=f"no Triton in {TRITON}")
def test_the_second_model_runner_computes_it_too(models: Path, tmp_path: Path):
    case = f"kept:{NESTED}:float32:{SMALL}"
    build(models, [case])
    found = run_cases("head_job", models, tmp_path, [case], beside=TRITON)(case)
    assert (found["runner"], found["head_dtype"]) == ("V2", "float32")
    assert worst_error(found["records"], head_of(models / str(SMALL) / NESTED)) <= 1e-5
