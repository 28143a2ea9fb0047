import pytest

from common.errors import ConfigError
from student_train.recipe import (
    PRESETS,
    STAGES,
    fit_preset,
    preset_recipe,
    read_recipe,
    recipe_differences,
)


def test_defaults_are_the_papers():
    levels = preset_recipe("cascade", base="paper", num_levels=3).levels
    assert [[stage.name for stage in stages] for stages in levels] == [
        ["dpt", "sft", "dft"],
        ["dft"],
        ["dft"],
    ]
    dpt, sft, dft = levels[0]
    assert dpt.trains == ("projector",)
    assert sft.trains == dft.trains == ("projector", "llm")
    assert dft.terms == {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
    assert (dpt.learning_rate, sft.learning_rate, dpt.batch_size, sft.batch_size) == (1e-3, 2e-5, 256, 128)
    assert sft.terms == {"ce": 1.0}


def test_tiny_recipe_is_the_studied_one():
    dpt, sft, dft = preset_recipe("cascade", base="tiny", num_levels=1).levels[0]
    assert [stage.steps for stage in (dpt, sft, dft)] == [150, 400, 400]
    assert (dpt.learning_rate, sft.learning_rate, dft.weight_decay, dft.betas) == (
        6e-3,
        3e-3,
        0.05,
        (0.9, 0.98),
    )


@pytest.mark.parametrize("name", ["pt-sft", "pt-sft-sft"])
def test_baselines_use_no_teacher(name):
    (stages,) = preset_recipe(name, base="tiny", num_levels=1).levels
    assert all(set(stage.terms) == {"ce"} for stage in stages)
    assert [stage.name for stage in stages] == name.split("-")
    with pytest.raises(ConfigError, match="for one cache, found 2"):
        preset_recipe(name, base="tiny", num_levels=2)


def test_kinds_select():
    caption = STAGES["paper"]["dpt"]
    rest = STAGES["paper"]["sft"]
    assert [caption.selects(kind) for kind in ("caption", "qa", None)] == [True, False, False]
    assert [rest.selects(kind) for kind in ("caption", "qa", None)] == [False, True, True]


def test_preset_adapts_to_a_cache_without_captions_or_visual_rows():
    stages = preset_recipe("cascade", base="tiny", num_levels=1).levels[0]
    dpt, _, dft = fit_preset(stages, ["qa"], {"ce", "response_kl"})
    assert dpt.kinds == ()
    assert dft.kinds == ("!caption",)
    assert set(dft.terms) == {"ce", "response_kl"}


def test_file_changes_named_stages(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'base = "tiny"\n[[levels]]\nstages = ["pt", {name = "again", like = "sft", epochs = 2}]\n'
        '[[levels]]\nstages = [{name = "dft", steps = 7, divergence = {tail = "zero"}, terms = {ce = 1}}]\n'
    )
    (first, again), (last,) = read_recipe(path, base="paper").levels
    assert first == STAGES["tiny"]["pt"]
    assert (again.name, again.steps, again.epochs) == ("again", None, 2)
    assert (last.steps, last.divergence.tail, last.terms) == (7, "zero", {"ce": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[levels]", "not valid TOML"),
        ("levels = 3", "wants \\[\\[levels\\]\\]"),
        ("[[levels]]\nstages = ['warm']", "known are pt, dpt, sft, dft"),
        ("[[levels]]\nstages = [{name = 'sft', lr = 1}]", "unknown field 'lr'; known are name"),
        ("[[levels]]\nstages = [{name = 'sft', steps = 3, epochs = 1}]", "either epochs or steps"),
        ("base = 'huge'\n[[levels]]\nstages = ['sft']", "wanted one of paper, tiny"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path, base="tiny")


def test_unknown_recipe_names_the_known():
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        preset_recipe("best", base="tiny", num_levels=1)


def test_differences_name_every_changed_leaf():
    old = {"seed": 0, "stages": [{"steps": 3, "terms": {"ce": 1.0}}]}
    new = {"seed": 0, "stages": [{"steps": 4, "terms": {"ce": 1.0, "relation": 0.5}}, {"steps": 1}]}
    assert recipe_differences(old, new) == [
        "stages.0.steps: 3 -> 4",
        "stages.0.terms.relation: null -> 0.5",
        'stages.1: null -> {"steps": 1}',
    ]
    assert recipe_differences(old, old) == []
