"""A teacher that answers itself: what is kept are its own words, and what it thought while saying them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.chat import image_token_id, to_question
from common.data.entries import to_sample
from common.data.open import open_source
from common.errors import ConfigError, DataError
from common.images import decode_image, image_bytes
from common.models import resolve_model
from common.processor import load_processor
from common.record import Record
from schemas.manifest import Encoding
from schemas.sample import ImageRef
from student_train.cli import main as student_train
from teacher_dump.asking import asked, open_data, read_questions, repeated
from teacher_dump.cli import main
from teacher_dump.config import DumpConfig
from tests.teacher_dump.answer_job import MAX_NEW_TOKENS, QUESTIONS, root_of, write_mixed
from tests.teacher_dump.forked import run_cases
from tests.teacher_dump.test_dump import assert_same

CASES = ["answered", "asked", "sampled:random", "sampled:mixed", "sampled:mass"]
TEACHER = resolve_model("tiny").path_or_id
STEP = Encoding().logit_step
LOGIT_ERROR = STEP / 2 + STEP / 32 + 1e-3
"""What the encoding may be off by, and what vLLM and transformers differ by."""


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    return run_cases("answer_job", tiny_dir, tmp_path_factory.mktemp("answers"), CASES)


@pytest.fixture(scope="module")
def root(tiny_dir: Path) -> Path:
    return root_of(tiny_dir)


def said_in(record: Record) -> list[list[int]]:
    """Ids of each response."""
    spans = [span for span in record.spans if span.kind == "response"]
    return [record.token_ids[span.start : span.stop].tolist() for span in spans]


@pytest.mark.slow
def test_every_turn_is_answered_whether_or_not_the_data_does(answers: Callable[[str], Any], root: Path):
    status, heard = answers("answered")
    assert status == 0, heard
    assert "1 samples quarantined" in heard
    assert "no-question" in (root / "answered.quarantine.jsonl").read_text()
    assert verify(str(root / "answered")).ok
    entries = {each["id"]: each["conversations"] for each in json.loads(write_mixed(root).read_text())}
    end = load_processor(TEACHER).tokenizer.eos_token_id
    with CacheReader(str(root / "answered")) as cache:
        assert cache.manifest.capture.responses == "teacher"
        assert set(cache.sample_ids) == set(entries) - {"silent"}
        early = 0
        for name in cache.sample_ids:
            found = said_in(cache.read_record(name))
            turns = [turn["from"] for turn in entries[name]]
            wanted = turns.count("gpt") + (turns[-1] == "human")
            cut = [len(each) == MAX_NEW_TOKENS and each[-1] != end for each in found]
            assert len(found) == wanted or cut[-1], name
            assert all(each[-1] == end for each, short in zip(found, cut, strict=True) if not short)
            assert not any(cut[:-1]), "a cut answer ends its dialogue"
            early += sum(len(each) < MAX_NEW_TOKENS for each in found)
        assert early, "some answers should end by themselves"


@pytest.mark.slow
def test_the_likeliest_token_was_said_at_every_row(answers: Callable[[str], Any], root: Path):
    answers("answered")
    with CacheReader(str(root / "answered")) as cache:
        for name in cache.sample_ids:
            record = cache.read_record(name)
            said = record.token_ids[record.response.positions + 1]
            assert (record.response.token_ids[:, 0] == said).all(), name


@pytest.mark.slow
@torch.inference_mode()
def test_answers_equal_those_of_transformers(answers: Callable[[str], Any], root: Path):
    from transformers import AutoModelForImageTextToText

    answers("answered")
    model = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float32).eval()
    processor = load_processor(TEACHER)
    source = open_source(str(write_mixed(root)))
    with CacheReader(str(root / "answered")) as cache:
        for name in ("train-000000-caption", "train-000001-caption", "unlabelled", "text"):
            sample = source[list(source.sample_ids()).index(name)]
            images = [
                decode_image(image_bytes(each, source.image_root), where=name) for each in sample.images
            ]
            record = cache.read_record(name)
            first = next(span for span in record.spans if span.kind == "response")
            shown = record.token_ids[: first.start]
            text = processor.tokenizer.decode(_collapse(shown, image_token_id(processor)))
            inputs = processor(
                text=text, images=images or None, return_tensors="pt", add_special_tokens=False
            )
            assert inputs["input_ids"][0].tolist() == shown.tolist()
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            assert output[0, len(shown) :].tolist() == said_in(record)[0]


def _collapse(ids: np.ndarray, mark: int) -> list[int]:
    """Runs of the image token as one."""
    return [token for at, token in enumerate(ids.tolist()) if token != mark or at == 0 or ids[at - 1] != mark]


@pytest.mark.slow
def test_asked_images_give_equal_caches_from_equal_seeds(answers: Callable[[str], Any], root: Path):
    for status, heard in answers("asked")["runs"]:
        assert status == 0, heard
    with CacheReader(str(root / "once" / "l1")) as one, CacheReader(str(root / "twice" / "l1")) as two:
        assert sorted(one.sample_ids) == sorted(two.sample_ids)
        assert len(one.sample_ids) == 4 * 3 * 2
        for name in one.sample_ids:
            assert_same(one.read_record(name), two.read_record(name))
        draws = [name for name in one.sample_ids if name.endswith("~2")]
        first = [said_in(one.read_record(name.removesuffix("~2"))) for name in draws]
        assert first != [said_in(one.read_record(name)) for name in draws], "draws should differ"
        keys = {image.key for name in one.sample_ids for image in one.read_record(name).visual}
        assert len(keys) == 4, "three questions and two draws share an image's knowledge"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["answered", "once/l1"])
def test_an_audit_finds_the_cache_to_be_its_teacher_s(
    cache: str, answers: Callable[[str], Any], root: Path, capsys: pytest.CaptureFixture[str]
):
    answers("asked")
    assert main(["verify", str(root / cache), "--sample", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for kind in ("response", "visual"):
        assert found[kind]["rows"] > 0
        assert found[kind]["max_logit_error"] <= LOGIT_ERROR
        assert found[kind]["topk_agreement"] > 0.99
        assert 0 <= found[kind]["kl_mean_nats"] <= found[kind]["kl_max_nats"] < 1e-3
    assert found["max_factor_error"] < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["random", "mixed", "mass"])
def test_sampled_ids_are_kept_and_pass_the_audit(
    mode: str, answers: Callable[[str], Any], root: Path, capsys: pytest.CaptureFixture[str]
):
    status, heard = answers(f"sampled:{mode}")["run"]
    assert status == 0, heard
    assert verify(str(root / mode)).ok
    with CacheReader(str(root / mode)) as cache:
        rows = [cache.read_record(name).response for name in cache.sample_ids]
    for kept in rows:
        used = np.isfinite(kept.logprobs)
        if mode == "mass":
            assert kept.counts is None
            held = np.exp(kept.logprobs.astype(np.float64)).sum(-1)
            assert ((held > 0.85) | (used.sum(-1) == 16)).all()
            continue
        assert kept.counts is not None
        assert (kept.counts.sum(-1) == {"random": 40, "mixed": 20}[mode]).all()
        assert ((kept.counts == 0) & used).sum(-1).max() == {"random": 0, "mixed": 16}[mode]
    assert main(["verify", str(root / mode), "--sample", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["response"]["max_logit_error"] <= LOGIT_ERROR


@pytest.mark.slow
def test_an_audit_tells_shifted_rows_and_other_weights(
    answers: Callable[[str], Any], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    answers("asked")
    with CacheReader(str(root / "once" / "l1")) as cache:
        manifest, size = cache.manifest, cache.num_samples
        records = [cache.read_record(index) for index in range(size)]
    manifest = manifest.model_copy(update={"part_samples": size})
    writer = CacheWriter.open(str(tmp_path / "shifted"), manifest)
    rolled = ("token_ids", "logprobs", "log_tail", "logsumexp")
    shifted = [
        replace(
            each,
            response=replace(
                each.response,
                **{name: np.roll(getattr(each.response, name), 1, axis=0) for name in rolled},
            ),
        )
        for each in records
    ]
    writer.write_part(0, shifted, first_sample=0, num_samples=size)
    writer.finalize()
    assert main(["verify", str(tmp_path / "shifted"), "--sample", "6"]) == 1
    assert "cache does NOT match its teacher" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "shifted"), "--model", "tiny-l1"]) == 2
    assert "was dumped from" in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_trains_on_asked_images(answers: Callable[[str], Any], root: Path, tmp_path: Path):
    answers("asked")
    run = ["--cache", str(root / "once" / "l1"), "--student", "tiny-student", "--out", str(tmp_path / "run")]
    assert student_train([*run, "--max-steps", "2", "--no-tensorboard", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines


@pytest.mark.slow
def test_status_counts_what_is_sealed(
    answers: Callable[[str], Any], root: Path, capsys: pytest.CaptureFixture[str]
):
    answers("asked")
    assert main(["--status", "--out", str(root / "once" / "l1"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sealed_parts"], found["parts"], found["complete"]) == (3, 3, True)
    assert (found["samples_done"], found["samples"], found["quarantined"]) == (24, 24, 0)
    size = sum(file.stat().st_size for file in (root / "once" / "l1" / "parts").rglob("*") if file.is_file())
    assert found["size_bytes"] == size - (root / "once" / "l1" / "parts" / "zarr.json").stat().st_size
    assert main(["--status", "--out", str(root / "once" / "l1")]) == 0
    assert "3 of 3 parts, 24 of 24 samples" in capsys.readouterr().out
    assert main(["--status", "--out", str(root / "nowhere")]) == 2


def test_questions_are_drawn_by_seed_and_image_alone():
    images = [ImageRef(path=f"{name}.png") for name in "abcdabc"]
    questions = list(map(str, range(50)))

    def texts(refs: list[ImageRef], seed: int) -> dict[str, str]:
        drawn = asked(iter(refs), questions, asks=3, draws=1, seed=seed)
        return {each["id"]: each["messages"][0]["content"][1]["text"] for each in drawn}

    once = texts(images, 5)
    assert len(once) == 4 * 3, "an image that comes again is asked once"
    assert texts(images[::-1], 5) == once
    assert texts(images, 6) != once
    assert all(len({once[f"{name}.png#{n}"] for n in (1, 2, 3)}) == 3 for name in "abcd")
    everything = list(asked(iter(images[:1]), questions[:2], asks=3, draws=2, seed=0))
    assert [each["id"] for each in everything] == ["a.png#1", "a.png#1~2", "a.png#2", "a.png#2~2"]


def test_repeated_samples_read_back_as_they_were(tmp_path: Path):
    source = open_source(str(write_mixed(tmp_path)))
    entries = list(repeated(source, 2))
    assert len(entries) == 2 * len(source)
    for index, entry in enumerate(entries[::2]):
        again = to_sample(entry, sample_id=entry["id"], where="here")
        assert again == source[index]


def test_repeating_keeps_unusable_samples_for_the_quarantine(tmp_path: Path):
    file = tmp_path / "some.json"
    good = {"id": "good", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    marked = {"from": "human", "value": "<image>\nhi"}
    file.write_text(json.dumps([good, {"id": "bad", "conversations": [marked, good["conversations"][1]]}]))
    source = open_source(str(file))
    entries = list(repeated(source, 3))
    assert [entry["id"] for entry in entries] == ["good", "good~2", "good~3", "bad"]
    with pytest.raises(DataError) as alone:
        source[1]
    with pytest.raises(DataError) as again:
        to_sample(entries[-1], sample_id="bad", where="here")
    assert (str(again.value), again.value.reason) == (str(alone.value), alone.value.reason)


def test_asked_data_is_written_once_and_bound_to_its_content(tmp_path: Path):
    write_mixed(tmp_path)
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS))
    config = DumpConfig(
        data=str(tmp_path / "shapes" / "images"), ask=str(tmp_path / "q.txt"), out=str(tmp_path / "l1")
    )
    first, second = open_data(config), open_data(config)
    assert first.path == second.path
    assert first.fingerprint() == second.fingerprint()
    other = open_data(config.model_copy(update={"seed": 1}))
    assert other.path != first.path
    assert first.image_root == str(tmp_path / "shapes" / "images")
    assert to_question(load_processor(TEACHER), first[0], _inputs(first)).images


def _inputs(source: Any) -> list[Any]:
    from common.chat import ImageInput

    pixels = decode_image(image_bytes(source[0].images[0], source.image_root), where="here")
    return [ImageInput("0" * 64, pixels.height, pixels.width)]


def test_a_file_without_questions_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no question"):
        read_questions(tmp_path / "empty.txt")
    (tmp_path / "none").mkdir()
    (tmp_path / "q.txt").write_text("what?")
    with pytest.raises(ConfigError, match="holds no image file"):
        open_data(DumpConfig(data=str(tmp_path / "none"), ask=str(tmp_path / "q.txt")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--response-temperature", "1"], "need --responses teacher"),
        (["--responses", "teacher", "--response-samples", "3"], "--response-temperature above 0"),
    ],
)
def test_contradictions_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(flags) == 2
    assert words in capsys.readouterr().err
