"""The command: whole, killed, interrupted, continued; bad data and bad settings refused in words."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cache.reader import CacheReader
from common.cache.verify import verify
from common.record import Record, TopK, VisualRecord
from student_train.cli import main as student_main
from teacher_dump import faults
from teacher_dump.cli import _sentence, main
from teacher_dump.config import DumpConfig
from teacher_dump.start import QUIET_LOGGERS
from tests import tiny_families
from tests.teacher_dump.dump_job import (
    IMAGES_EVERY,
    NUM_SAMPLES,
    command,
    work_of,
    write_bad_data,
    write_data,
)
from tests.teacher_dump.forked import ROOT, run_cases

CASES = [
    "whole",
    "trial",
    "killed",
    "bucket",
    "response_only",
    "interrupted",
    "bad",
    "full_disk",
    "without_vllm",
]


@pytest.fixture(scope="module")
def work(tiny_dir: Path) -> Path:
    return work_of(tiny_dir)


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    tiny_families.build("llava_siglip", tiny_dir)
    return run_cases("dump_job", tiny_dir, tmp_path_factory.mktemp("answers"), CASES)


def assert_same_rows(found: TopK | None, wanted: TopK | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        for name in ("positions", "token_ids", "logprobs", "log_tail", "logsumexp"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


def assert_same_image(found: VisualRecord, wanted: VisualRecord) -> None:
    assert (found.key, found.image_sha256, found.start, found.tiles) == (
        wanted.key,
        wanted.image_sha256,
        wanted.start,
        wanted.tiles,
    )
    assert_same_rows(found.topk, wanted.topk)
    assert np.array_equal(found.factor, wanted.factor)  # type: ignore[arg-type]


def assert_same(found: Record, wanted: Record) -> None:
    assert found.sample_id == wanted.sample_id
    assert np.array_equal(found.token_ids, wanted.token_ids)
    assert found.spans == wanted.spans
    assert_same_rows(found.response, wanted.response)
    for ours, theirs in zip(found.visual, wanted.visual, strict=True):
        assert_same_image(ours, theirs)


@pytest.mark.slow
def test_a_whole_dump_is_complete_and_sound(answers: Callable[[str], Any], work: Path):
    status, heard = answers("whole")
    assert status == 0, heard
    assert f"on {NUM_SAMPLES} samples" in heard
    lines = re.split("[\r\n]+", heard.strip())
    strangers = [line for line in lines if line and not line.startswith(("teacher-dump: ", "dump: "))]
    assert len(strangers) == 2, "only the result stands beside the bar"
    assert strangers[1].startswith("next: ")
    report = verify(str(work / "whole"))
    assert report.ok, report
    with CacheReader(str(work / "whole")) as cache:
        assert cache.complete
        assert sorted(cache.sample_ids) == [f"s{index:03}" for index in range(NUM_SAMPLES)]


@pytest.mark.slow
def test_a_trial_foretells_what_the_whole_dump_takes(answers: Callable[[str], Any], work: Path):
    answers("whole")
    found = answers("trial")
    assert not found["left"]
    trial = found["plan"]["trial"]
    size, low, high = trial["size_bytes"]
    assert low < size < high
    with CacheReader(str(work / "whole")) as cache:
        files = [file for seal in cache.seals.values() for file in seal.files.values()]
    assert size == pytest.approx(sum(file.size_bytes for file in files), rel=0.15)
    assert 0 < trial["seconds"][1] < trial["seconds"][0] < trial["seconds"][2]
    assert trial["quarantine_share"] == pytest.approx([0, 0, 0.138], abs=0.001)
    assert 24 <= trial["samples"] < NUM_SAMPLES


@pytest.mark.slow
def test_image_knowledge_is_kept_once_an_image(answers: Callable[[str], Any], work: Path):
    answers("whole")
    with CacheReader(str(work / "whole")) as cache:
        records = [cache.read_record(name) for name in cache.sample_ids]
        keys = {visual.key for record in records for visual in record.visual}
        asked = sum(len(record.visual) for record in records)
        assert len(keys) == NUM_SAMPLES // IMAGES_EVERY
        assert asked > 2 * len(keys)
        # An image's samples stand together, so only an image at the border of two parts is kept twice.
        assert sum(seal.num_images for seal in cache.seals.values()) <= len(keys) + len(cache.seals)


@pytest.mark.slow
def test_killed_dumps_continue_and_end_with_the_same_values(answers: Callable[[str], Any], work: Path):
    answer = answers("killed")
    assert answer["status"] == 0
    assert 0 < answer["progress"][1] < answer["progress"][2] <= NUM_SAMPLES // 6
    assert answer["again"][0] == 0
    assert "(0 dumped now)" in answer["again"][1]
    assert verify(str(work / "killed")).ok
    with CacheReader(str(work / "killed")) as found, CacheReader(str(work / "whole")) as wanted:
        assert list(found.sample_ids) == list(wanted.sample_ids)
        for name in wanted.sample_ids:
            assert_same(found.read_record(name), wanted.read_record(name))


@pytest.mark.slow
def test_a_killed_dump_into_a_bucket_continues_with_the_same_values(
    answers: Callable[[str], Any], work: Path
):
    answer = answers("bucket")
    assert answer["before"] >= 2
    assert answer["status"] == 0
    assert not answer["problems"]
    assert not answer["left"], "no copy of the level is needed"
    assert answer["free"] is None, "a bucket has no end"
    with CacheReader(str(work / "whole")) as wanted:
        assert [record.sample_id for record in answer["records"]] == list(wanted.sample_ids)
        for record in answer["records"]:
            assert_same(record, wanted.read_record(record.sample_id))


@pytest.mark.slow
def test_responses_alone_still_name_every_image(answers: Callable[[str], Any], work: Path):
    status, heard = answers("response_only")
    assert status == 0, heard
    with (
        CacheReader(str(work / "response-only")) as found,
        CacheReader(str(work / "whole")) as wanted,
    ):
        assert list(found.sample_ids) == list(wanted.sample_ids)
        for name in wanted.sample_ids:
            ours, theirs = found.read_record(name), wanted.read_record(name)
            assert ours.spans == theirs.spans
            assert_same_rows(ours.response, theirs.response)
            assert len(ours.visual) == sum(span.kind == "image" for span in ours.spans)
            for image, whole in zip(ours.visual, theirs.visual, strict=True):
                assert (image.key, image.image_sha256, image.start, image.num_positions, image.tiles) == (
                    whole.key,
                    whole.image_sha256,
                    whole.start,
                    whole.num_positions,
                    whole.tiles,
                )
                assert image.topk is None
                assert image.factor is None
                assert image.hidden is None


@pytest.mark.slow
def test_a_student_trains_on_responses_alone(
    answers: Callable[[str], Any], work: Path, tiny_dir: Path, tmp_path: Path
):
    answers("response_only")
    run = tmp_path / "run"
    flags = ["--student", str(tiny_dir / "llava_siglip"), "--out", str(run), "--max-steps", "2"]
    cache = ["--cache", str(work / "response-only")]
    assert student_main([*cache, *flags, "--log-steps", "1", "--no-tensorboard"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("raw/response_kl" in line for line in lines)
    assert not any("raw/visual_kl" in line or "raw/relation" in line for line in lines)


@pytest.mark.slow
def test_an_interrupt_keeps_whole_parts_and_says_how_to_go_on(answers: Callable[[str], Any], work: Path):
    answer = answers("interrupted")
    assert answer["status"] == 130
    assert "run the same command again to resume" in answer["said"]
    assert answer["sealed"] >= 1
    report = verify(str(work / "interrupted"))
    assert not report.bad_parts
    with CacheReader(str(work / "interrupted")) as found, CacheReader(str(work / "whole")) as wanted:
        for name in found.sample_ids:
            assert_same(found.read_record(name), wanted.read_record(name))


@pytest.mark.slow
def test_bad_samples_are_quarantined_with_their_reason(answers: Callable[[str], Any], work: Path):
    answer = answers("bad")
    assert answer["generous"][0] == 0, answer["generous"][1]
    assert "10 samples quarantined" in answer["generous"][1]
    reasons = {line["sample_id"]: line["reason"] for line in answer["lines"]}
    assert {name: reasons[name] for name in sorted(reasons)} == {
        "s000": "image-missing",
        "s001": "image-unreadable",
        "s002": "image-unreadable",
        "s003": "image-unreadable",
        "s004": "image-marks",
        "s005": "image-marks",
        "s006": "empty-response",
        "s008": "too-long",
        "s010": "text",
        "s011": "video",
    }
    assert all(line["detail"] for line in answer["lines"])
    with CacheReader(str(work / "badly")) as cache:
        assert len(cache.sample_ids) == NUM_SAMPLES - 10
        record = cache.read_record("s009")
    with CacheReader(str(work / "whole")) as cache:
        wanted = cache.read_record("s009")
    np.testing.assert_allclose(record.response.logsumexp, wanted.response.logsumexp, atol=0.02)


@pytest.mark.slow
def test_too_many_bad_samples_stop_the_dump(answers: Callable[[str], Any]):
    status, heard = answers("bad")["strict"]
    assert status == 2
    assert "cannot be used, --max-quarantine allows a share of 0.05" in heard
    assert "image-missing" in heard


@pytest.mark.slow
def test_a_disk_that_refuses_seals_nothing(answers: Callable[[str], Any]):
    answer = answers("full_disk")
    status, heard = answer["refused"]
    assert status == 2
    assert "repair the disk" in heard
    assert answer["sealed"] == 0


@pytest.mark.slow
def test_another_identity_is_refused_field_by_field(
    answers: Callable[[str], Any], work: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
):
    answers("whole")
    other = command(tiny_dir, work / "data" / "train.json", work / "whole", "--topk", "8")
    assert main(other) == 2
    heard = capsys.readouterr().err
    assert "topk" in heard
    assert "another --out" in heard


@pytest.fixture
def arguments(tiny_family: Callable[[str], Path], tmp_path: Path) -> list[str]:
    models = tiny_family("llava_siglip").parent
    return command(models, write_data(tmp_path / "data"), tmp_path / "out")


REFUSED = [
    (["--topk", "1000"], "--topk is 1000, .* has [0-9]+ tokens"),
    (["--visual-topk", "5000"], "--visual-topk is 5000"),
    (["--model", "17b"], "unknown model '17b'"),
    (["--model", "."], "no config.json"),
    (["--data", "nowhere.json"], "nowhere.json does not exist"),
    (["--engine-arg", "nonsense"], "key=value"),
    (["--engine-arg", "model=other"], "set by the dump itself"),
    (["--temperature", "-1"], "positive"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_bad_settings_are_refused_in_words(
    flags: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, *flags]) == 2
    with pytest.raises(AssertionError, match=words):
        assert not capsys.readouterr().err


def test_dry_run_counts_without_loading_anything(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples"] == NUM_SAMPLES
    assert plan["images"] == NUM_SAMPLES // IMAGES_EVERY
    assert plan["parts"] == NUM_SAMPLES // 6
    assert plan["size_bytes"] > 10_000
    assert plan["positions"] > 40 * NUM_SAMPLES
    assert "vllm" not in sys.modules
    assert main([*arguments, "--dry-run"]) == 0
    assert "samples with" in capsys.readouterr().out


def test_a_dry_run_counts_bad_samples(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad = [*arguments, "--data", str(write_bad_data(tmp_path / "bad")), "--dry-run"]
    assert main([*bad, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bad_samples"]
    assert found["checked"] == NUM_SAMPLES
    # An empty, a torn and a wrong file, and a long answer, show only when they are read.
    wanted = {"image-missing": 1, "image-marks": 2, "empty-response": 1, "text": 1, "video": 1}
    assert found["by_reason"] == wanted
    assert main(bad) == 0
    said = capsys.readouterr().out
    assert f"6 bad samples among {NUM_SAMPLES}" in said
    assert "2 × image-marks" in said
    assert "nowhere.png" in said
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"no bad sample among {NUM_SAMPLES} ({NUM_SAMPLES} of them under the chat template; images" in said


def test_the_next_command_can_be_pasted_and_sets_the_processor_alike():
    config = DumpConfig(chat_template="my chat.jinja", max_pixels=1003520)
    result = {"cache": "my zarr/l1", "parts": 1, "dumped": 1, "quarantined": 0}
    line = _sentence(result, config).splitlines()[-1]
    assert shlex.split(line.removeprefix("next: ")) == [
        *("student-train", "--cache", "my zarr/l1"),
        *("--chat-template", "my chat.jinja", "--max-pixels", "1003520"),
    ]
    assert _sentence(result | {"cache": "l1"}, DumpConfig()).endswith("next: student-train --cache l1")


def test_a_dry_run_notes_a_directory_without_weights(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = Path(arguments[arguments.index("--model") + 1])
    bare = shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    for model, weights in ((whole, True), (bare, False)):
        given = [*arguments, "--model", str(model), "--dry-run"]
        assert main([*given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights"] == weights
        assert main(given) == 0
        assert (f"note: {model} has no weights" in capsys.readouterr().out) != weights


@pytest.mark.parametrize("asks", [False, True])
def test_a_dry_run_counts_what_the_chat_template_refuses(
    asks: bool, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = write_data(tmp_path / "other")
    entries = json.loads(file.read_text())
    entries[3]["conversations"][1]["value"] = "two of them  "
    entries[5]["conversations"][1]["value"] = "two <|im_end|> and more"
    entries[7]["conversations"] *= 2
    entries[7]["conversations"][2] = {"from": "human", "value": "a forbidden word"}
    file.write_text(json.dumps(entries))
    template = tmp_path / "trims.jinja"
    template.write_text(_TRIMS)
    given = [*arguments, "--data", str(file), "--chat-template", str(template), "--dry-run"]
    given += ["--responses", "teacher"] if asks else []
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bad_samples"]
    assert found["by_reason"] == ({"template": 1} if asks else {"end-of-turn": 1, "template": 2})
    assert main(given) == 0
    assert "bad samples among" in capsys.readouterr().out


_TRIMS = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}"
    "{% if 'forbidden' in part.text %}{{ raise_exception('no') }}{% endif %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_dry_run_of_large_data_renders_evenly_spaced_samples(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("teacher_dump.faults._MOST_RENDERED", 5)
    rendered: list[str] = []
    real = faults.render
    monkeypatch.setattr(faults, "render", lambda *given: rendered.append(given[1].sample_id) or real(*given))
    assert main([*arguments, "--dry-run", "--json", "--shuffle-seed", "1", "--limit", "21"]) == 0
    found = json.loads(capsys.readouterr().out)["bad_samples"]
    assert (found["checked"], found["rendered"]) == (21, 5)
    assert len(set(rendered)) == 5


@pytest.mark.slow
def test_vllm_missing_says_how_to_install(answers: Callable[[str], Any]):
    status, heard = answers("without_vllm")
    assert status == 2
    assert "pip install 'cascache[teacher]'" in heard
    assert "cascache[teacher-cpu]" in heard


def test_loggers_that_are_quietened_exist():
    assert all(importlib.util.find_spec(name) for name in QUIET_LOGGERS)


def test_help_imports_nothing_heavy():
    heavy = ("torch", "vllm", "transformers", "zarr", "datasets", "PIL", "numpy")
    code = (
        "import sys\nfrom teacher_dump.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert "--topk" in done.stdout
    assert "Tokens kept per response position." in done.stdout
