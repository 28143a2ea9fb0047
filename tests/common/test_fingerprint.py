"""Equal fingerprints mean compatible: names do not matter, behaviour does."""

import json
import shutil
from pathlib import Path

import pytest

from common.compat import check_fit, require_fit
from common.errors import ConfigError, MismatchError
from common.fingerprint import config_sha256, fingerprints, weights_sha256
from common.models import resolve_model
from common.processor import load_processor
from schemas.manifest import Capture, Manifest, SampleSet, TeacherIdentity

TEACHER = Path(resolve_model("tiny-l2").path_or_id)


@pytest.fixture
def processor():
    return load_processor(str(TEACHER))


@pytest.fixture
def manifest(processor):
    return Manifest(
        teacher=TeacherIdentity(
            model="tiny-l2", weights_sha256="0" * 64, model_type="llava", dtype="float32"
        ),
        fingerprints=fingerprints(processor),
        vocab_rows=448,
        vocab_size=440,
        hidden_size=128,
        samples=SampleSet(fingerprint="0" * 64, num_samples=1),
        capture=Capture(topk=8, visual_topk=8),
        part_samples=1,
    )


def test_presets_of_one_family_share_fingerprints(processor):
    other = load_processor(resolve_model("tiny-student").path_or_id)
    assert fingerprints(processor) == fingerprints(other)


def test_a_saved_copy_under_another_name_fits(processor, tmp_path):
    processor.save_pretrained(tmp_path / "renamed")
    assert fingerprints(load_processor(str(tmp_path / "renamed"))) == fingerprints(processor)


def test_another_token_changes_only_the_tokenizer(processor):
    before = fingerprints(processor)
    processor.tokenizer.add_tokens(["brandnew"])
    after = fingerprints(processor)
    assert after.tokenizer != before.tokenizer
    assert (after.chat_template, after.image_processor) == (before.chat_template, before.image_processor)


def test_another_template_changes_only_the_template(processor):
    before = fingerprints(processor)
    processor.chat_template = processor.chat_template.replace("| upper", "| lower")
    after = fingerprints(processor)
    assert after.chat_template != before.chat_template
    assert (after.tokenizer, after.image_processor) == (before.tokenizer, before.image_processor)


@pytest.mark.parametrize("change", [{"size": {"height": 56, "width": 56}}, {"image_mean": [0.4, 0.5, 0.5]}])
def test_other_pixels_change_only_the_image_processor(processor, change):
    before = fingerprints(processor)
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    after = fingerprints(processor)
    assert after.image_processor != before.image_processor
    assert (after.tokenizer, after.chat_template) == (before.tokenizer, before.chat_template)


def test_one_flipped_bit_changes_the_weights_hash(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(TEACHER, copy)
    assert weights_sha256(copy) == weights_sha256(TEACHER)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_sha256(copy) != weights_sha256(TEACHER)


def test_settings_change_the_config_hash_and_names_do_not(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(TEACHER, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert config_sha256(copy) == config_sha256(TEACHER)
    config["text_config"]["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    assert config_sha256(copy) != config_sha256(TEACHER)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        weights_sha256(tmp_path)


def test_a_matching_student_fits(manifest, processor):
    fit = check_fit(manifest, processor, vocab_rows=448)
    assert fit.problems == ()
    assert fit.notes == ()


def test_padding_rows_are_a_note_not_a_problem(manifest, processor):
    notes = require_fit("zarr/l1", manifest, "tiny-student", processor, vocab_rows=512)
    assert "padded differently" in notes[0]


def test_a_head_smaller_than_the_vocabulary_is_refused(manifest, processor):
    with pytest.raises(MismatchError, match="439 rows for 440 real tokens"):
        require_fit("zarr/l1", manifest, "tiny-student", processor, vocab_rows=439)


def test_every_differing_field_is_named_with_a_cure(manifest, processor):
    processor.tokenizer.add_tokens(["brandnew"])
    processor.chat_template = processor.chat_template.replace("| upper", "| lower")
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(MismatchError) as refused:
        require_fit("zarr/l1", manifest, "tiny-student", processor, vocab_rows=448)
    for words in ("tokenizer differs", "chat template differs", "image processor differs", "tiny-l2"):
        assert words in str(refused.value)
