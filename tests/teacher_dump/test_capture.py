"""The capture inside vLLM gives what transformers gives in float32 on the same weights.

All engine cases of this file run in one process, forked once each; see `forked`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.processor import ProcessorOptions, load_processor
from common.record import Record
from common.relation import factor_exact, head_gram, relation
from common.spans import response_rows
from teacher_dump.request import Captured
from tests import tiny_families
from tests.teacher_dump.engine_job import BOUNDS, TOPK
from tests.teacher_dump.examples import prepare, samples
from tests.teacher_dump.forked import run_cases

FAMILIES = ("llava_siglip", "llava_onevision", "qwen2_5_vl")
WHOLE, CHUNKED = "4096", "128"
CASES = [
    *(f"capture:{family}:{batched}" for family in FAMILIES for batched in (WHOLE, CHUNKED)),
    "capture:qwen3_vl:4096",
    "capture:internvl:4096",
    "bounded:qwen2_5_vl",
    "bounded:qwen3_vl",
    "tampered:llava_siglip",
    "shifted_rows:llava_siglip",
    "preempted:llava_siglip",
    "shared:llava_onevision:on",
    "shared:llava_onevision:off",
    "missing_seam:llava_siglip",
    "public:llava_siglip",
    "vanishing:llava_siglip",
]
CAPTURES = [case for case in CASES if case.startswith("capture")]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    out = tmp_path_factory.mktemp("engine")
    for family in {case.split(":")[1] for case in CASES}:
        tiny_families.build(family, tiny_dir)
    size = len(tiny_families.make_tokenizer())
    tiny_families.build("llava_siglip", tiny_dir / "unpadded", vocab=size)
    return run_cases("engine_job", tiny_dir, out, CASES)


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> Callable[[str], dict[str, dict[str, torch.Tensor]]]:
    """Logits of real tokens and final hidden states of transformers in float32, by family and sample."""
    known: dict[str, dict[str, dict[str, torch.Tensor]]] = {}

    def of(family: str) -> dict[str, dict[str, torch.Tensor]]:
        if family not in known:
            known[family] = forward_all(tiny_dir / family)
        return known[family]

    return of


@torch.inference_mode()
def forward_all(
    directory: Path, options: ProcessorOptions | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = load_processor(str(directory), options=options)
    answers = {}
    for example in samples():
        item = prepare(processor, example)
        text = processor.tokenizer.decode(item.prompt.prompt_ids)
        inputs = processor(text=text, images=list(item.pixels) or None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == item.prompt.token_ids.tolist()
        output = model(**inputs, output_hidden_states=True)
        size = len(processor.tokenizer)
        weight = model.get_output_embeddings().weight[:size]
        answers[example.sample_id] = {
            "logits": output.logits[0, :, :size],
            "hidden": output.hidden_states[-1][0],
            "gram": head_gram(weight),
        }
    return answers


def check_rows(found: Any, logits: torch.Tensor) -> None:
    """Rows equal the dense logits at both temperatures, with the same kept set."""
    exact = logits.double()
    lse = torch.stack([exact.logsumexp(-1), (exact / 2).logsumexp(-1)], -1).numpy()
    assert np.abs(found.logsumexp - lse).max() <= TOLERANCE
    best = exact.topk(TOPK, dim=-1)
    raw = found.logprobs + found.logsumexp[:, :1]
    assert np.abs(raw - best.values.numpy()).max() <= TOLERANCE
    assert (np.sort(found.token_ids, -1) == np.sort(best.indices.numpy(), -1)).all()
    rest = exact.scatter(-1, best.indices, float("-inf"))
    tails = torch.stack([rest.logsumexp(-1), (rest / 2).logsumexp(-1)], -1).numpy() - lse
    assert np.abs(found.log_tail - tails).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CAPTURES)
def test_equals_transformers_in_float32(
    case: str, answers: Callable[[str], Any], reference: Callable[[str], Any], tiny_dir: Path
):
    family = case.split(":")[1]
    check_captured(answers(case)["captured"], reference(family), tiny_dir / family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_engine_and_driver_scale_images_into_the_same_bounds(
    family: str, answers: Callable[[str], Any], tiny_dir: Path
):
    own, processor = (load_processor(str(tiny_dir / family), options=each) for each in (None, BOUNDS))
    lengths = [
        [len(prepare(each, sample).prompt.token_ids) for sample in samples()] for each in (own, processor)
    ]
    assert any(before > after for before, after in zip(*lengths, strict=True)), "none is scaled down"
    assert any(before < after for before, after in zip(*lengths, strict=True)), "none is scaled up"
    expected = forward_all(tiny_dir / family, BOUNDS)
    answer = answers(f"bounded:{family}")
    check_captured(answer["captured"], expected, tiny_dir / family, BOUNDS)
    assert answer["loaded"] < len(samples()), "vLLM loads a processor for every request"


def check_captured(
    captured: list[Captured],
    expected: dict[str, Any],
    model: Path,
    options: ProcessorOptions | None = None,
) -> None:
    """Every sample's rows, states and factors equal those of transformers."""
    processor = load_processor(str(model), options=options)
    for example, found in zip(samples(), captured, strict=True):
        assert found.problem is None, f"{found.key}: {found.problem}"
        prompt = prepare(processor, example).prompt
        wanted = expected[example.sample_id]
        check_rows(found.response, wanted["logits"][response_rows(prompt.spans)])
        assert sorted(found.images) == list(range(len(prompt.images)))
        for index, image in found.images.items():
            span = slice(prompt.images[index].start, prompt.images[index].stop)
            check_rows(image.rows, wanted["logits"][span])
            assert np.abs(image.hidden - wanted["hidden"][span].numpy()).max() <= TOLERANCE
            check_factor(image, relation(wanted["hidden"][span], wanted["gram"]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CAPTURES)
def test_an_image_in_one_prefix_is_known_once_and_for_all(case: str, answers: Callable[[str], Any]):
    """Another question on the same image changes none of its rows, states or factor."""
    found = {each.key: each.images for each in answers(case)["captured"]}
    first, second = found["one-0"][0], found["shared"][0]
    assert (first.rows.token_ids == second.rows.token_ids).all()
    assert np.abs(first.rows.logprobs - second.rows.logprobs).max() <= TOLERANCE
    assert np.abs(first.hidden - second.hidden).max() <= TOLERANCE
    kept = (first.factor @ first.factor.T, second.factor @ second.factor.T)
    assert np.abs(kept[0] - kept[1]).max() <= 1e-3 * np.abs(kept[0]).max()


def check_factor(image: Any, matrix: torch.Tensor) -> None:
    """The factor's direction is as far from the relation's as it says, and of the exact twin's rank."""
    kept = torch.from_numpy(np.array(image.factor)).double()
    approximate = kept @ kept.T
    exact = matrix.double()
    distance = float((approximate / approximate.norm() - exact / exact.norm()).norm())
    assert distance <= image.factor_error + 1e-5
    assert image.factor_error <= 1e-3
    assert abs(kept.shape[1] - factor_exact(exact, tolerance=1e-3, max_rank=128).factor.shape[1]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CAPTURES)
def test_equals_prompt_logprobs_of_the_same_engine(case: str, answers: Callable[[str], Any], tiny_dir: Path):
    processor = load_processor(str(tiny_dir / case.split(":")[1]))
    item, size = prepare(processor, samples()[0]), len(processor.tokenizer)
    rows = response_rows(item.prompt.spans)
    found, oracle = answers(case)["captured"][0].response, answers(case)["oracle"]
    for index, row in enumerate(rows):
        everything = oracle[row + 1]  # entry p + 1 is the distribution from the logits at p
        assert len(everything) > size, "the head should be padded"
        real = np.array([everything[token] for token in range(size)])
        expected = real - np.logaddexp.reduce(real)
        for token, logprob in zip(found.token_ids[index].tolist(), found.logprobs[index], strict=True):
            assert expected[token] == pytest.approx(logprob, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tampering", "reason", "words"),
    [
        ("swapped", "image-mismatch", "vLLM shows images"),
        ("dropped", "image-mismatch", "vLLM shows images"),
        ("duplicated", "image-mismatch", "vLLM shows images"),
        ("another", "image-mismatch", "vLLM shows images"),
        ("none", "image-mismatch", r"vLLM shows images \[\]"),
        ("shifted-image", "image-mismatch", "at 7"),
        ("shifted-tokens", "prompt-mismatch", "expected ones"),
    ],
)
def test_a_teacher_that_did_not_see_the_image_is_caught(
    tampering: str, reason: str, words: str, answers: Callable[[str], Any]
):
    found = answers("tampered:llava_siglip")[tampering]
    assert found.reason == reason
    assert found.response is None
    assert not found.images
    with pytest.raises(AssertionError, match=words):
        assert found.problem is None, found.problem


@pytest.mark.slow
def test_an_engine_goes_on_after_refusing(answers: Callable[[str], Any]):
    found = answers("tampered:llava_siglip")
    assert found["untouched"].problem is None
    assert found["after"].problem is None


@pytest.mark.slow
def test_rows_shifted_by_one_are_caught(answers: Callable[[str], Any]):
    found: Captured = answers("shifted_rows:llava_siglip")
    assert found.reason == "position-shift"
    assert "was computed from token" in (found.problem or "")


@pytest.mark.slow
def test_preemption_loses_and_repeats_nothing(answers: Callable[[str], Any]):
    found = answers("preempted:llava_siglip")
    assert found["preemptions"] > 0
    for preempted, calm in zip(
        found["captured"], answers("capture:llava_siglip:4096")["captured"], strict=True
    ):
        assert preempted.problem is None, preempted.problem
        assert np.abs(preempted.response.logsumexp - calm.response.logsumexp).max() <= TOLERANCE
        assert (preempted.response.token_ids == calm.response.token_ids).all()


def assert_close(found: Record, wanted: Record) -> None:
    assert (found.sample_id, found.spans) == (wanted.sample_id, wanted.spans)
    pairs = [(found.response, wanted.response)]
    for ours, theirs in zip(found.visual, wanted.visual, strict=True):
        assert ours.key == theirs.key
        assert ours.topk is not None
        assert theirs.topk is not None
        pairs.append((ours.topk, theirs.topk))
        assert np.abs(ours.hidden - theirs.hidden).max() <= TOLERANCE  # type: ignore[operator]
    for rows, expected in pairs:
        assert (rows.positions == expected.positions).all()
        assert np.abs(rows.logsumexp - expected.logsumexp).max() <= TOLERANCE
        assert np.abs(rows.logprobs - expected.logprobs).max() <= TOLERANCE


@pytest.mark.slow
def test_questions_share_an_image_through_the_prefix_cache(answers: Callable[[str], Any]):
    """Every wanted position is seen exactly once an image; rows that another sample computed come again."""
    cached, plain = answers("shared:llava_onevision:on"), answers("shared:llava_onevision:off")
    for found, wanted in zip(cached["results"], plain["results"], strict=True):
        assert isinstance(found, Record), found
        assert_close(found, wanted)
    assert cached["waves"] > plain["waves"], "a sample asked again had its rows in the cache"
    assert cached["computed"] < 0.8 * plain["computed"]


@pytest.mark.slow
def test_a_part_does_not_depend_on_the_parts_before_it(answers: Callable[[str], Any]):
    case = answers("shared:llava_onevision:on")
    for found, wanted in zip(case["again"], case["results"], strict=True):
        assert np.array_equal(found.response.logsumexp, wanted.response.logsumexp)
        assert np.array_equal(found.visual[0].hidden, wanted.visual[0].hidden)


@pytest.mark.slow
def test_a_missing_seam_is_named(answers: Callable[[str], Any]):
    message = answers("missing_seam:llava_siglip")
    assert message.startswith("EngineError")
    assert "prompt_logprobs_worker" in message
    assert "0.32.0" in message
    assert "--capture prompt-logprobs" in message


@pytest.mark.slow
def test_without_the_seam_rows_come_through_prompt_logprobs(answers: Callable[[str], Any], tiny_dir: Path):
    """Log-probs and kept sets are exact; the mass outside is within float32's rounding of a sum."""
    model = tiny_dir / "unpadded" / "llava_siglip"
    expected, processor = forward_all(model), load_processor(str(model))
    found = answers("public:llava_siglip")
    for example, captured in zip(samples(), found["captured"], strict=True):
        assert captured.problem is None, f"{captured.key}: {captured.problem}"
        prompt, logits = prepare(processor, example).prompt, expected[example.sample_id]["logits"]
        check_public(captured.response, logits[response_rows(prompt.spans)], TOPK)
        for index, image in captured.images.items():
            assert image.hidden is None
            assert image.factor is None
            check_public(image.rows, logits[prompt.images[index].start : prompt.images[index].stop], 8)
    assert found["beyond"].reason == "rows-missing"


def check_public(found: Any, logits: torch.Tensor, topk: int) -> None:
    exact = logits.double().log_softmax(-1)
    best = exact.topk(topk, dim=-1)
    assert np.abs(found.logprobs - best.values.numpy()).max() <= TOLERANCE
    assert (np.sort(found.token_ids, -1) == np.sort(best.indices.numpy(), -1)).all()
    outside = 1 - best.values.exp().sum(-1).numpy()
    assert np.abs(np.exp(found.log_tail[:, 0].astype(np.float64)) - outside).max() <= 1e-5
    assert not found.logsumexp.any()


@pytest.mark.slow
def test_an_untested_vllm_is_refused(answers: Callable[[str], Any]):
    message = answers("vanishing:llava_siglip")
    assert message.startswith("EngineError: found vllm 9.9.9")
    assert "--any-vllm" in message
