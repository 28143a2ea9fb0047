"""A dump without `--out` finds its own level: the first free one, or the one it was stopped in."""

from pathlib import Path

import pytest

from common.cache.layout import identity_sha256
from common.cache.writer import CacheWriter
from common.errors import ConfigError
from common.models import TINY, ModelRef
from common.processor import load_processor
from schemas.manifest import Capture
from teacher_dump.arguments import check_arguments, telling_arguments
from teacher_dump.config import DumpConfig
from teacher_dump.engine import Engine
from teacher_dump.level import choose_out, engine_settings
from teacher_dump.teacher import Teacher
from tests.common.cache.records import make_manifest


def test_levels_are_taken_in_order_and_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (make_manifest(num_samples=number) for number in (3, 4))
    assert choose_out("auto", first) == "./zarr/l1"
    CacheWriter.open(choose_out("auto", first), first)
    assert choose_out("auto", first) == "./zarr/l1"
    assert choose_out("auto", second) == "./zarr/l2"
    CacheWriter.open(choose_out("auto", second), second)
    assert choose_out("auto", second) == "./zarr/l2"
    assert choose_out("auto", None) == "./zarr/l3"


def test_a_named_place_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_out("elsewhere/x", make_manifest(num_samples=1)) == "elsewhere/x"


def test_arguments_that_change_answers_are_part_of_the_identity():
    manifest = make_manifest(num_samples=1)
    tell = telling_arguments({"hf_overrides": {"rope_theta": 5}, "gpu_memory_utilization": 0.5})
    assert tell == {"hf_overrides": '{"rope_theta": 5}'}
    changed = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"engine": tell})})
    renamed = manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"model": "./t"})})
    assert identity_sha256(changed) != identity_sha256(manifest)
    assert identity_sha256(renamed) == identity_sha256(manifest)


@pytest.mark.parametrize(
    ("name", "cure"), [("dtype", "--dtype"), ("quantization", "--quantization"), ("model", "--model")]
)
def test_arguments_that_the_dump_sets_are_refused_with_their_flag(name, cure):
    with pytest.raises(ConfigError, match=f"{name} is set by the dump itself; use {cure}"):
        check_arguments({name: "x"})


def test_a_quantisation_reaches_the_engine():
    """It is a flag of the dump, which `--engine-arg` must not set as well."""
    config = DumpConfig(quantization="fp8", head_dtype="auto")
    teacher = Teacher(
        ref=ModelRef("t", "t", None, "llava"),
        path=Path("t"),
        revision=None,
        processor=load_processor(str(TINY / "tiny-l1")),
        model_type="llava",
        dtype="bfloat16",
        vocab_rows=8,
        hidden_size=4,
        max_positions=64,
    )
    settings = engine_settings(config, teacher, Capture(topk=4, visual_topk=4))
    assert Engine(settings).settings.quantization == "fp8"
    assert settings.head_dtype == "bfloat16"
