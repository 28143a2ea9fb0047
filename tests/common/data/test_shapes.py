import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data import scenes
from common.data.open import open_source
from common.data.shapes import materialise, parse_shapes, write_shapes
from common.errors import ConfigError
from common.images import read_image

MANY = [scenes.scene_at(3, index) for index in range(400)]


def tree(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def grid(scene):
    return {thing.cell: (thing.shape, thing.colour) for thing in scene.things}


def test_golden_scene():
    scene = scenes.scene_at(0, 0)
    assert scenes.caption(scene) == (
        "a purple square at top left , a blue diamond at bottom left , the number nine at bottom ."
    )
    asked = ["where", "shape", "compare", "exist", "count", "digit"]
    assert [question.kind for question in scenes.questions(scene, 6)] == asked


def test_scenes_depend_on_seed_and_index_only():
    assert [scenes.scene_at(3, index) for index in (7, 2)] == [MANY[7], MANY[2]]
    assert scenes.scene_at(4, 7).things != MANY[7].things
    assert (scenes.draw(MANY[7]) == scenes.draw(MANY[7])).all()


def test_things_never_share_a_cell():
    for scene in MANY:
        cells = [thing.cell for thing in scene.things] + ([scene.digit[1]] if scene.digit else [])
        assert len(set(cells)) == len(cells)
        assert 2 <= len(scene.things) <= 5


def test_pictures_show_the_colours_where_the_scene_says():
    for scene in MANY[:50]:
        picture = scenes.draw(scene, noise=0.0).astype(float)
        for thing in scene.things:
            row, column = thing.cell // 3 * 16 + 7, thing.cell % 3 * 16 + 7
            assert abs(picture[row, column] - scenes.COLOURS[thing.colour]).max() < 70
        for cell in set(range(9)) - set(grid(scene)) - ({scene.digit[1]} if scene.digit else set()):
            corner = picture[cell // 3 * 16 : cell // 3 * 16 + 16, cell % 3 * 16 : cell % 3 * 16 + 16]
            assert np.ptp(corner) == 0


def truth(question, scene):
    """The answer, worked out from the question's words: a second opinion on every generator."""
    things = list(grid(scene).values())
    cells = {f"{colour} {shape}": cell for cell, (shape, colour) in grid(scene).items()}
    singular = dict(zip(scenes.PLURALS, scenes.SHAPES, strict=True))
    count = Counter(shape for shape, _ in things)
    text = question.text
    if found := re.fullmatch(r"what colour is the (\w+) \?", text):
        return [colour for shape, colour in things if shape == found[1]]
    if found := re.fullmatch(r"what shape is the (\w+) thing \?", text):
        return [shape for shape, colour in things if colour == found[1]]
    if text == "how many shapes are there ?":
        return [scenes.NUMBERS[len(things)]]
    if found := re.fullmatch(r"how many (\w+) are there \?", text):
        return [scenes.NUMBERS[count[singular[found[1]]]]]
    if found := re.fullmatch(r"is there a (\w+ \w+) \?", text):
        return ["yes" if found[1] in cells else "no"]
    if found := re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+) \?", text):
        first, second = cells[found[1]], cells[found[3]]
        before = first % 3 < second % 3 if "of" in found[2] else first // 3 < second // 3
        return ["yes" if before == (found[2] in ("left of", "above")) else "no"]
    if text == "what number is written ?":
        return [scenes.NUMBERS[scene.digit[0]] if scene.digit else "none"]
    if found := re.fullmatch(r"where is the (\w+ \w+) \?", text):
        return [scenes.PLACES[cells[found[1]]]]
    found = re.fullmatch(r"are there more (\w+) than (\w+) \?", text)
    return ["yes" if count[singular[found[1]]] > count[singular[found[2]]] else "no"]


def test_answers_are_true():
    for scene in MANY:
        for question in scenes.questions(scene, 12):
            assert truth(question, scene) == [question.answer], question


def test_questions_differ_and_cover_every_kind():
    asked = [scenes.questions(scene, 6) for scene in MANY]
    assert all(len({question.text for question in questions}) == len(questions) <= 6 for questions in asked)
    counts = Counter(question.kind for questions in asked for question in questions)
    assert set(counts) == set(scenes.QUESTION_KINDS)
    assert min(counts.values()) > 100


def test_no_kind_is_won_by_one_answer():
    counts = {kind: Counter() for kind in scenes.QUESTION_KINDS}
    for scene in MANY:
        for question in scenes.questions(scene, 6):
            counts[question.kind][question.answer] += 1
    for kind, answers in counts.items():
        assert answers.most_common(1)[0][1] / answers.total() < 0.66, (kind, answers)


def test_label_noise_changes_that_share_of_answers_and_nothing_else():
    changed = total = 0
    for scene in MANY:
        for right, noisy in zip(
            scenes.questions(scene, 6), scenes.questions(scene, 6, label_noise=0.3), strict=True
        ):
            assert (right.kind, right.text) == (noisy.kind, noisy.text)
            assert noisy.answer in (*scenes.ANSWERS[right.kind], right.answer)
            changed += right.answer != noisy.answer
            total += 1
    assert changed / total == pytest.approx(0.3, abs=0.03)


def test_written_sets_read_as_llava_data(tmp_path):
    path = write_shapes(tmp_path, num_images=5, seed=3)
    source = open_source(str(path))
    assert [sample.kind for sample in source] == ["caption", "qa"] * 5
    for index, scene in enumerate(MANY[:5]):
        caption, asked = source[2 * index], source[2 * index + 1]
        assert caption.turns[0].parts == (0, "describe the image .")
        assert caption.turns[1].parts == (scenes.caption(scene),)
        wanted = scenes.questions(scene, 6)
        assert asked.turns[0].parts == (0, wanted[0].text)
        assert [turn.parts[-1] for turn in asked.turns[1::2]] == [question.answer for question in wanted]
        assert [turn.parts[-1] for turn in asked.turns[::2]] == [question.text for question in wanted]
        np.testing.assert_array_equal(
            np.asarray(read_image(asked.images[0], source.image_root)), scenes.draw(scene)
        )
    keys = source.image_keys()
    assert (keys[::2] == keys[1::2]).all()
    assert len(set(keys.tolist())) == 5


def test_same_settings_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shapes(tmp_path / name, num_images=4, seed=1, label_noise=0.5)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    write_shapes(tmp_path / "c", num_images=4, seed=2)
    assert tree(tmp_path / "c") != tree(tmp_path / "a")


def test_held_out_sets_ask_one_question_a_sample(tmp_path):
    path = write_shapes(
        tmp_path, num_images=6, seed=1, name="held_out", captions=False, one_question_a_sample=True
    )
    source = open_source(str(path))
    assert all(len(sample.turns) == 2 for sample in source)
    assert {sample.kind for sample in source} <= set(scenes.QUESTION_KINDS)


SPEC = "shapes:train=4,held_out=3,seed=5,noise=0.5,dir={}"


def test_built_in_data_is_made_once_and_reused(tmp_path):
    spec = SPEC.format(tmp_path / "shapes")
    train, held_out = open_source(spec), open_source(spec + ",split=held_out")
    assert len(train) == 8
    assert {Path(source.path).name for source in (train, held_out)} == {"train.json", "held_out.json"}
    assert open_source(train.path).fingerprint() == train.fingerprint()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    open_source(spec)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_held_out_images_are_others_and_clean(tmp_path):
    spec = SPEC.format(tmp_path / "shapes")
    train, held_out = open_source(spec), open_source(spec + ",split=held_out")
    hashes = [
        {hashlib.sha256(Path(source.image_root, s.images[0].path).read_bytes()).hexdigest() for s in source}
        for source in (train, held_out)
    ]
    assert not hashes[0] & hashes[1]
    for sample in held_out:
        scene = scenes.scene_at(500_005, int(sample.sample_id.split("-")[1]))
        question = scenes.Question(sample.kind, sample.turns[0].parts[1], "")
        assert truth(question, scene) == list(sample.turns[1].parts)


def test_an_interrupted_set_is_finished(tmp_path):
    spec = SPEC.format(tmp_path / "shapes")
    open_source(spec)
    whole = tree(tmp_path)
    (tmp_path / "shapes" / "train.json").unlink()
    (tmp_path / "shapes" / "images" / "train" / "000001.png").write_bytes(b"half")
    open_source(spec)
    assert tree(tmp_path) == whole


def test_the_default_place_tells_settings_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = materialise("shapes:train=2,held_out=0")
    second = materialise("shapes:train=2,held_out=0,seed=1")
    assert first.parent != second.parent
    assert first.is_relative_to(tmp_path / "build" / "data")
    assert json.loads((first.parent / "shapes.json").read_text())["train"] == 2


def test_other_data_is_never_mixed_in(tmp_path):
    spec = SPEC.format(tmp_path / "shapes")
    open_source(spec)
    with pytest.raises(ConfigError, match="holds shapes made with"):
        open_source(spec.replace("seed=5", "seed=6"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="other data"):
        open_source(SPEC.format(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shapes:trian=3", "known keys are train"),
        ("shapes:train=0", "train: "),
        ("shapes:seed=1000000", "seed: "),
        ("shapes:train", "key=value"),
        ("shapes:split=test", "held_out"),
    ],
)
def test_malformed_specs_say_what_is_known(spec, says):
    with pytest.raises(ConfigError, match=says):
        parse_shapes(spec)
