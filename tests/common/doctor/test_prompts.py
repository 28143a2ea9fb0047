"""Data, template and image settings are judged on real samples, without a model."""

import json
import shutil

import pytest
from PIL import Image

from common.data.open import open_source
from common.data.shapes import write_shapes
from common.doctor import prompts
from common.doctor.config import DoctorConfig, to_flags
from common.models import TINY
from common.processor import load_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data"), num_images=6, seed=1, questions_per_image=2)


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(TINY / "tiny-l2"))


def test_good_data_passes_and_shows_where_the_response_is(data, processor):
    source = open_source(str(data))
    tried = prompts.try_samples(processor, source)
    assert prompts.check_data(source, tried).status == "pass"
    template = prompts.check_template(processor, tried)
    answer = source[0].turns[1].parts[0]
    assert template.status == "pass"
    shown = template.values["around_response"][0]
    assert f"ASSISTANT:⟪ {answer[:16]}" in shown
    assert shown.endswith(f"{answer[-16:]}</s>⟫")
    assert template.values["end_tokens"] == ["</s>"]
    images = prompts.check_images(processor, tried, max_len=1024)
    assert images.status == "pass"
    assert images.values["positions_per_image"] == {"min": 36, "median": 36, "max": 36}


def spoil(data, tmp_path, change):
    entries = json.loads(data.read_text())
    for number, entry in enumerate(entries):
        change(number, entry)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(entries))
    return open_source(str(path), image_root=str(data.parent))


@pytest.mark.parametrize(("every", "status"), [(1, "fail"), (2, "fail"), (100, "fail")])
def test_unusable_samples_are_counted_by_reason(data, processor, tmp_path, every, status):
    def lose(number, entry):
        if number % every == 0:
            entry["image"] = "images/nowhere.png"

    source = spoil(data, tmp_path, lose)
    tried = prompts.try_samples(processor, source)
    found = prompts.check_data(source, tried)
    assert found.status == status
    assert found.values["unusable_by_reason"] == {"image-missing": len(range(0, len(source), every))}
    assert "nowhere.png" in found.cure


def test_few_bad_samples_are_a_warning(processor, tmp_path):
    data = write_shapes(tmp_path, num_images=40, seed=1, questions_per_image=1)
    source = spoil(data, tmp_path, lambda n, entry: entry.update(image="images/x.png") if n == 0 else None)
    found = prompts.check_data(source, prompts.try_samples(processor, source))
    assert found.status == "warn"


def test_a_template_that_changes_the_answer_fails(data, tmp_path):
    template = (TINY / "tiny-l2" / "chat_template.jinja").read_text()
    changed = tmp_path / "upper.jinja"
    changed.write_text("{% filter upper %}" + template + "{% endfilter %}")
    processor = load_processor(str(TINY / "tiny-l2"), options=DoctorConfig(chat_template=str(changed)))
    tried = prompts.try_samples(processor, open_source(str(data)))
    found = prompts.check_template(processor, tried)
    assert found.status == "fail"
    assert "--chat-template" in found.cure
    assert prompts.check_images(processor, tried, max_len=1024).status == "pass"


@pytest.mark.parametrize(("max_len", "status"), [(30, "fail"), (1024, "pass")])
def test_samples_that_are_too_long_are_told(data, processor, max_len, status):
    tried = prompts.try_samples(processor, open_source(str(data)))
    found = prompts.check_images(processor, tried, max_len=max_len)
    assert found.status == status
    assert ("--max-len" in found.cure) == (status != "pass")


def test_sizes_of_the_data_make_the_positions(tiny_family, tmp_path):
    for name, size in (("small", (56, 56)), ("wide", (400, 100))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    entries = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it"},
                {"from": "gpt", "value": "a cat"},
            ],
        }
        for name in ("small", "wide")
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    processor = load_processor(str(tiny_family("qwen2_5_vl")))
    tried = prompts.try_samples(processor, open_source(str(tmp_path / "train.json")))
    found = prompts.check_images(processor, tried, max_len=4096)
    positions = found.values["positions_per_image"]
    assert positions["min"] < positions["max"]
    assert found.values["largest_image"] == (400, 100)
    assert found.values["backend"] in ("torchvision", "PIL", "pil")


def test_a_broken_processor_is_not_blamed_on_the_data(tmp_path):
    model = shutil.copytree(TINY / "tiny-l2", tmp_path / "model")
    (model / "processor_config.json").write_text("{")
    data = write_shapes(tmp_path / "data", num_images=2, seed=1)
    lines = run(DoctorConfig(model=str(model), data=str(data)))
    assert lines[-1] == {"done": True}
    checks = [line["check"] for line in lines if "check" in line]
    assert [(each["name"], each["status"]) for each in checks] == [("data", "pass"), ("template", "fail")]
    assert "no processor" in checks[1]["found"]
    assert checks[1]["cure"]


def run(config: DoctorConfig) -> list[dict]:
    """Lines of the part, run in a process of its own because it takes standard output over."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "common.doctor.prompts", *to_flags(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TINY.parents[1], check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]
