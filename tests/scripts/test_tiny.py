"""The shipped models: loadable, of one family, exact in float32, as accurate as their table says."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.data import scenes
from common.data.entries import to_sample
from common.models import TINY
from scripts import tiny_data, train_tiny

NAMES = ("tiny-student", "tiny-l1", "tiny-l2")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY / "tiny-l2")


def load(name):
    return AutoModelForImageTextToText.from_pretrained(TINY / name).eval()


def test_all_together_stay_under_8_mb():
    assert sum(path.stat().st_size for path in TINY.rglob("*")) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_exactly_under_both_names_of_the_tower(name):
    model, info = AutoModelForImageTextToText.from_pretrained(TINY / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = load_file(TINY / name / "model.safetensors")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert not any(key.startswith("vision_tower.") and ".vision_model." not in key for key in stored)
    embedding = stored["language_model.model.embed_tokens.weight"]
    assert (model.get_input_embeddings().weight == embedding.float()).all()


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_padded_and_32_wide(name, processor):
    text = load(name).config.text_config
    assert text.vocab_size % 64 == 0
    assert text.vocab_size > len(processor.tokenizer)
    assert text.hidden_size == 32 * text.num_attention_heads


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "processor_config.json"])
def test_one_family(file):
    assert len({(TINY / name / file).read_bytes() for name in NAMES}) == 1


def test_the_tower_is_shared():
    towers = [
        {k: v for k, v in load_file(TINY / name / "model.safetensors").items() if k.startswith("vision")}
        for name in NAMES
    ]
    for other in towers[1:]:
        assert other.keys() == towers[0].keys()
        assert all((other[key] == towers[0][key]).all() for key in other)


def messages(sample):
    image = {"type": "image"}
    return [
        {
            "role": turn.role,
            "content": [image if isinstance(p, int) else {"type": "text", "text": p} for p in turn.parts],
        }
        for turn in sample.turns
    ]


@pytest.mark.parametrize("pairs_of", [tiny_data.question_pairs, tiny_data.caption_pairs])
def test_training_ids_are_the_processors_own(processor, pairs_of):
    for index in range(20):
        scene = scenes.scene_at(9, index)
        pairs = pairs_of(scene)
        turns = [
            {"from": who, "value": text}
            for pair in pairs
            for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        sample = to_sample({"image": "x", "conversations": turns}, sample_id="x", where="x")
        text = processor.apply_chat_template(messages(sample))
        assert text == "".join(piece for piece, _ in tiny_data.render(pairs))
        wanted = processor(text=text, images=[scenes.draw(scene)], return_tensors="pt")
        found = tiny_data.tokenise(processor.tokenizer, [tiny_data.render(pairs)])
        assert found.ids.tolist() == wanted.input_ids.tolist()
        torch.testing.assert_close(tiny_data.pixels([scene]), wanted.pixel_values, atol=1e-6, rtol=0)


def test_generation_prompt_is_a_prefix_of_the_conversation(processor):
    chat = [{"role": "user", "content": "hi ?"}, {"role": "assistant", "content": "yes"}]
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert processor.apply_chat_template(chat) == prompt + " yes</s>"


def test_any_text_can_be_read_and_written_back(processor):
    text = "Zebra\tquux — naïve 😀?"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_patch_labels_follow_the_picture():
    scene = scenes.scene_at(9, 0)
    labels = tiny_data.patch_labels([scene])[0].reshape(6, 6, 5)
    thing = scene.things[0]
    row, column = thing.cell // 3 * 2, thing.cell % 3 * 2
    shape = 1 + scenes.SHAPES.index(thing.shape)
    assert (labels[row : row + 2, column : column + 2, 0] == shape).all()
    assert labels[row, column, 3:].tolist() == [thing.cell // 3, thing.cell % 3]


@pytest.mark.parametrize("name", NAMES)
def test_fast_hidden_states_equal_the_models_own(name, processor):
    model = load(name)
    scene = scenes.scene_at(9, 1)
    text = "".join(piece for piece, _ in tiny_data.render(tiny_data.question_pairs(scene)))
    inputs = processor(text=text, images=[scenes.draw(scene)], return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits
        features = train_tiny.tower_features(model, inputs.pixel_values)
        found = model.lm_head(train_tiny.hidden_states(model, inputs.input_ids, features))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def claimed_macro(name):
    text = (TINY / "README.md").read_text("utf-8")
    found = re.search(rf"^\| `{name}` \| [\d.]+ \| ([\d.]+) \|", text, re.MULTILINE)
    return float(found[1])


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_what_the_table_says(name, processor):
    scores = train_tiny.examine(load(name), processor.tokenizer, 120)
    assert scores["macro"] == pytest.approx(claimed_macro(name), abs=0.06)


def test_greedy_generation_agrees_with_the_examination(processor):
    model, right, total = load("tiny-l2"), 0, 0
    for index in range(8):
        scene = scenes.scene_at(train_tiny.EXAM_SEED, index)
        for question in scenes.questions(scene, 4):
            text = tiny_data.render([(question.text, "")])[0][0]
            inputs = processor(text=text, images=[scenes.draw(scene)], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answer = processor.tokenizer.decode(
                output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
            )
            right += answer.strip() == question.answer
            total += 1
    examined = train_tiny.examine(model, processor.tokenizer, 8)
    kinds = [q.kind for i in range(8) for q in scenes.questions(scenes.scene_at(train_tiny.EXAM_SEED, i), 4)]
    assert right == round(sum(examined[kind] for kind in kinds))
    assert total == len(kinds)


def test_every_stage_runs_and_leaves_its_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["train_tiny", "--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work"), "--scale", "0.002"],
    )
    train_tiny.main()
    for name in train_tiny.STAGES:
        assert json.loads((tmp_path / "work" / f"{name}.json").read_text())
    assert "tiny-l2" in capsys.readouterr().out
    assert (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny" / "tiny-l1").config.model_type
        == "llava"
    )
