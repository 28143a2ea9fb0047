import json
import shutil

import pytest

from common.data.open import open_source
from common.errors import CacheError, ConfigError, MismatchError
from scripts.plain_dump import dump_plain
from student_train.plan import make_plan
from tests import tiny_families
from tests.student_train.conftest import STUDENT, TEACHER


def swap_two_ids(text: str) -> str:
    table = json.loads(text)
    vocabulary = table["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    return json.dumps(table)


def test_everything_is_chosen_from_the_cache(config, cache, shapes):
    open_ended = config.model_copy(update={"student": STUDENT, "recipe": None, "out": None})
    plan = make_plan(open_ended)
    assert [each.name for each in plan.stages] == ["l1/dpt", "l1/sft", "l1/dft"]
    assert [each.num_steps for each in plan.stages] == [150, 400, 400]
    assert [each.sampler.num_samples for each in plan.stages] == [24, 24, 24]
    assert plan.out.parts == ("runs", "tiny-student-l1")
    assert str(shapes) in plan.choices()
    assert f"student fits {cache}" in plan.describe()


def test_what_may_surprise_is_noted(config, tmp_path, shapes):
    tables = json.loads(shapes.read_text())
    few = [{**table, "kind": "qa"} for table in tables if table["kind"] == "qa"][:4]
    only = tmp_path / "few.json"
    only.write_text(json.dumps(few))
    cache = dump_plain(TEACHER, open_source(str(only), image_root=str(shapes.parent)), tmp_path / "zarr")
    plan = make_plan(config.model_copy(update={"cache": (str(cache),), "recipe": None}))
    assert "l1/dpt takes all samples: its filter caption selects none" in plan.notes
    assert any("goes over its 4 samples" in note for note in plan.notes)


def test_student_defaults_to_the_smallest_of_the_teachers_family(config):
    assert make_plan(config.model_copy(update={"student": None})).student.name == "tiny-student"


def test_a_student_of_another_family_is_refused_before_any_weight_is_read(config, tmp_path):
    other = tiny_families.build("llava_siglip", tmp_path)
    (other / "model.safetensors").unlink()
    with pytest.raises(
        MismatchError, match=r"tokenizer differs[\s\S]*chat template differs[\s\S]*image processor"
    ):
        make_plan(config.model_copy(update={"student": str(other)}))


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("chat_template.jinja", lambda text: text.replace("| upper", "| lower"), "chat template"),
        (
            "processor_config.json",
            lambda text: text.replace('"height": 48', '"height": 56'),
            "image processor",
        ),
        ("tokenizer.json", swap_two_ids, "tokenizer"),
    ],
)
def test_the_differing_field_is_named(config, tmp_path, file, change, field):
    shutil.copytree(STUDENT, tmp_path / "other")
    path = tmp_path / "other" / file
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    with pytest.raises(MismatchError, match=f"{field} differs") as found:
        make_plan(config.model_copy(update={"student": str(tmp_path / "other")}))
    assert str(found.value).count("differs") == 1


def test_other_data_is_refused(config, held_out):
    with pytest.raises(MismatchError, match=r"48 of 48 samples of .* are not in .*held_out\.json"):
        make_plan(config.model_copy(update={"data": str(held_out)}))


def test_missing_things_are_named_before_training(config, tmp_path):
    for changes, error, message in (
        ({"cache": (str(tmp_path / "none"),)}, CacheError, "none"),
        ({"data": str(tmp_path / "none.json")}, ConfigError, "none.json does not exist"),
        ({"eval": str(tmp_path / "exam.json")}, ConfigError, "exam.json does not exist"),
        ({"recipe": str(tmp_path / "r.toml")}, ConfigError, "r.toml does not exist"),
        ({"student": "no-such-preset"}, ConfigError, "no-such-preset"),
    ):
        with pytest.raises(error, match=message):
            make_plan(config.model_copy(update=changes))


def test_recipe_and_caches_must_have_as_many_levels(config, cache):
    with pytest.raises(ConfigError, match="1 levels, there are 2 caches"):
        make_plan(config.model_copy(update={"cache": (str(cache), str(cache))}))


def test_identity_is_json_and_sees_what_matters(config):
    plan = make_plan(config)
    assert json.loads(json.dumps(plan.identity())) == json.loads(json.dumps(make_plan(config).identity()))
    for change in ({"seed": 3}, {"shuffle_blocks": 3}, {"student": TEACHER}, {"recipe": "cascade"}):
        assert make_plan(config.model_copy(update=change)).identity() != plan.identity()
    for change in ({"out": "elsewhere"}, {"log_steps": 7}, {"workers": 1}, {"micro_batch": 2}):
        assert make_plan(config.model_copy(update=change)).identity() == plan.identity()


def test_a_temperature_without_a_normaliser_is_refused(config, tmp_path):
    path = tmp_path / "warm.toml"
    path.write_text(
        'base = "tiny"\n[[levels]]\nstages = [{name = "dft", steps = 1, divergence = {temperature = 2}}]'
    )
    with pytest.raises(ConfigError, match=r"wants temperature 2, .* holds normalisers for 1;"):
        make_plan(config.model_copy(update={"recipe": str(path)}))


def test_a_cache_without_a_finished_part_is_refused(config, cache, tmp_path):
    from common.cache.reader import CacheReader
    from common.cache.writer import CacheWriter

    CacheWriter.open(str(tmp_path / "empty"), CacheReader(str(cache)).manifest)
    with pytest.raises(CacheError, match="holds no finished part yet"):
        make_plan(config.model_copy(update={"cache": (str(tmp_path / "empty"),)}))
