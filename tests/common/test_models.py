import json

import pytest

from common import models
from common.errors import ConfigError
from common.models import ModelRef, family_of_teacher, resolve_model, smallest_of_family


@pytest.mark.parametrize(
    ("name", "hub_id", "family"),
    [
        ("0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-onevision"),
        ("7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision"),
        ("72b", "llava-hf/llava-onevision-qwen2-72b-ov-hf", "llava-onevision"),
        ("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "llava-1.5"),
        ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl"),
        ("qwen3-vl-32b", "Qwen/Qwen3-VL-32B-Instruct", "qwen3-vl"),
    ],
)
def test_hub_presets(name, hub_id, family):
    assert resolve_model(name) == ModelRef(name, hub_id, "main", family)


@pytest.mark.parametrize("name", ["tiny", "tiny-l1", "tiny-l2", "tiny-student"])
def test_tiny_presets_are_shipped(name):
    found = resolve_model(name)
    assert (found.revision, found.family) == (None, "tiny")
    assert found.path_or_id.endswith("tiny-l2" if name == "tiny" else name)


@pytest.mark.parametrize(
    ("family", "smallest"),
    [
        ("tiny", "tiny-student"),
        ("llava-onevision", "0.5b"),
        ("llava-1.5", "llava-1.5-7b"),
        ("qwen2.5-vl", "qwen2.5-vl-3b"),
        ("qwen3-vl", "qwen3-vl-2b"),
    ],
)
def test_smallest_of_family(family, smallest):
    assert smallest_of_family(family).name == smallest


def test_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match="llava-onevision"):
        smallest_of_family("gpt")


def test_directories_need_a_config(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="model_type"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    assert resolve_model(str(tmp_path)) == ModelRef(str(tmp_path), str(tmp_path.resolve()), None, "qwen3-vl")


def test_a_shipped_directory_named_by_path_keeps_its_family():
    assert resolve_model(str(models.TINY / "tiny-l1")).family == "tiny"


def test_hub_ids_pass_through_and_know_their_preset():
    assert resolve_model("someone/their-vlm") == ModelRef(
        "someone/their-vlm", "someone/their-vlm", "main", "someone/their-vlm"
    )
    assert resolve_model("Qwen/Qwen3-VL-2B-Instruct").family == "qwen3-vl"


@pytest.mark.parametrize(("typed", "near"), [("tiny-12", "tiny-l2"), ("qwen3vl-2b", "qwen3-vl-2b")])
def test_unknown_names_suggest_the_nearest(typed, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        resolve_model(typed)


@pytest.mark.parametrize("typed", ["", "a/b/c", "../nowhere", "/no/such/dir", "no such"])
def test_malformed_names_list_the_presets(typed):
    with pytest.raises(ConfigError, match="tiny-l1"):
        resolve_model(typed)


@pytest.mark.parametrize(
    ("name", "model_type", "family"),
    [
        ("7b", "llava_onevision", "llava-onevision"),
        ("tiny-l1", "llava_onevision", "tiny"),
        ("someone/their-vlm", "qwen3_vl", "qwen3-vl"),
        ("/data/of/another/machine", "llava", "llava-1.5"),
        ("/data/of/another/machine", "internvl", "internvl"),
    ],
)
def test_a_teachers_family_is_known_by_its_name_or_by_its_type(name, model_type, family):
    assert family_of_teacher(name, model_type) == family


def test_a_runs_directory_names_its_model(tmp_path):
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a run that is not finished: .*student-train command again"):
        resolve_model(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"is a run's directory, not a model; give {tmp_path / 'model'}$"):
        resolve_model(str(tmp_path))
