import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.errors import ConfigError, MismatchError
from common.processor import load_processor
from student_train.model import FAMILIES, load_student, read_shape, save_student
from tests import tiny_families
from tests.student_train.conftest import STUDENT

BUILT = list(tiny_families.FAMILIES)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: tiny_families.build(family, root) for family in BUILT}


@pytest.mark.parametrize("family", BUILT)
def test_every_weight_belongs_to_the_right_part(directories, family):
    student = load_student(str(directories[family]))
    names = [name for name, _ in student.named_parameters()]
    parts = {part: [n for n in names if student.part_of(n) == part] for part in ("tower", "projector", "llm")}
    assert all(parts.values())
    assert all("language_model" in name or "lm_head" in name for name in parts["llm"])
    assert all("projector" in n or "merger" in n or "newline" in n for n in parts["projector"])
    assert not any("merger" in name or "projector" in name for name in parts["tower"])


@pytest.mark.parametrize("family", BUILT)
@pytest.mark.parametrize("trains", [("projector",), ("projector", "llm")])
def test_stages_train_what_they_say_and_nothing_else(directories, family, trains):
    student = load_student(str(directories[family]))
    student.freeze_but(trains)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    inputs = one_image(directories[family], student)
    optimizer = torch.optim.SGD([v for v in student.parameters() if v.requires_grad], lr=0.1)
    hidden = student.hidden(inputs)
    (hidden @ student.head_weight.T).logsumexp(-1).mean().backward()
    optimizer.step()
    changed = {student.part_of(n) for n, v in student.named_parameters() if not v.equal(before[n])}
    assert changed == set(trains)


@pytest.mark.parametrize("family", BUILT)
def test_hidden_times_head_is_the_models_own_logits(directories, family):
    student = load_student(str(directories[family])).eval()
    inputs = one_image(directories[family], student)
    with torch.no_grad():
        wanted = student.model(**inputs).logits
        found = student.hidden(inputs) @ student.head_weight.T
    assert (found - wanted).abs().max() <= 1e-5


def test_tower_stays_in_evaluation_mode():
    student = load_student(STUDENT)
    student.train()
    assert student.model.training
    assert not student.model.model.vision_tower.training


def test_text_only_batches_still_reach_the_projector():
    student = load_student(STUDENT)
    student.freeze_but(("projector",))
    ids = torch.tensor([[1, 10, 11]])
    student.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).sum().backward()
    grads = [value.grad for value in student.parameters_of("projector")]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_recomputed_activations_change_nothing():
    plain, recomputing = load_student(STUDENT), load_student(STUDENT)
    recomputing.recompute_activations()
    ids = torch.tensor([[1, 10, 11, 12]])
    grads = []
    for student in (plain, recomputing):
        student.freeze_but(("projector", "llm"))
        student.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).square().sum().backward()
        grads.append([value.grad for value in student.parameters_of("llm") if value.grad is not None])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", BUILT)
def test_saved_directory_loads_as_it_was(directories, family, tmp_path):
    source = str(directories[family])
    student, processor = load_student(source), load_processor(source)
    with torch.no_grad():
        for value in student.parameters_of("projector"):
            value.add_(0.25)
    save_student(student, processor, tmp_path / "model", card="# card")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours, theirs = student.model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].equal(value) for name, value in ours.items())
    assert AutoProcessor.from_pretrained(tmp_path / "model").chat_template == processor.chat_template
    assert (tmp_path / "model" / "README.md").read_text() == "# card"
    with pytest.raises(MismatchError, match="exists already"):
        save_student(student, processor, tmp_path / "model", card="")


def test_sampling_settings_of_old_checkpoints_do_not_stop_saving(tmp_path):
    """A temperature without `do_sample`, as Vicuna's files have it."""
    shutil.copytree(STUDENT, tmp_path / "old")
    file = tmp_path / "old" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    save_student(load_student(str(tmp_path / "old")), load_processor(STUDENT), tmp_path / "new", card="")
    saved = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.9, 0.6, True)


def test_tower_has_the_names_that_hub_checkpoints_and_vllm_use(tmp_path):
    save_student(load_student(STUDENT), load_processor(STUDENT), tmp_path / "model", card="")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        towers = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
    assert towers
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)


def test_unknown_family_says_what_to_add(tmp_path):
    shutil.copytree(STUDENT, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"model_type": "vipllava"}))
    with pytest.raises(ConfigError, match=r"type 'vipllava'.*FAMILIES of student_train/model\.py"):
        read_shape(str(tmp_path / "odd"))
    assert "llava" in FAMILIES


def test_soft_capped_head_is_refused(tmp_path):
    shutil.copytree(STUDENT, tmp_path / "capped")
    config = json.loads((tmp_path / "capped" / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 30.0
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="final_logit_softcapping = 30"):
        load_student(str(tmp_path / "capped"))


def test_missing_weights_are_refused(tmp_path):
    shutil.copytree(STUDENT, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        load_student(str(tmp_path / "half"))


def one_image(directory, student):
    from PIL import Image

    processor = load_processor(str(directory))
    image = Image.effect_noise((56, 56), 60).convert("RGB")
    text = f"{processor.image_token} a cat on the mat"
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    if student.family.token_types:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == student.model.config.image_token_id).long()
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}
