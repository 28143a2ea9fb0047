import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import TrainingError
from student_train.model import Student, load_student
from student_train.step import StageTrainer
from student_train.train import Run, train
from tests.student_train.conftest import STUDENT


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "model" / "model.safetensors")


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(theirs[name].equal(value) for name, value in ours.items())


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """An uninterrupted run of twelve steps."""
    from tests.student_train.conftest import RECIPE

    directory = tmp_path_factory.mktemp("whole")
    (directory / "recipe.toml").write_text(RECIPE)
    from student_train.config import TrainConfig

    config = TrainConfig(
        cache=(str(cache),),
        student=STUDENT,
        recipe=str(directory / "recipe.toml"),
        out=str(directory / "run"),
        tensorboard=False,
        log_steps=1,
        save_steps=100,
    )
    return train(config)


def test_a_run_says_what_it_did(whole):
    assert whole["finished"]
    assert whole["steps"] == whole["total_steps"] == 12
    assert list(whole["stages"]) == ["l1/dpt", "l1/sft", "l1/dft"]
    assert len(lines(whole["out"])) == 12
    assert json.loads((Path(whole["out"]) / "summary.json").read_text())["steps"] == 12


def test_every_term_is_reported_raw_and_weighted(whole):
    dft = lines(whole["out"])[-1]
    weighted = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
    for term, weight in weighted.items():
        assert dft[f"weighted/{term}"] == pytest.approx(weight * dft[f"raw/{term}"])
        assert dft[f"raw/{term}"] > 0
    assert dft["loss"] == pytest.approx(sum(dft[f"weighted/{term}"] for term in weighted))
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "data_wait_share", "step_seconds"):
        assert dft[name] >= 0
    assert "raw/visual_kl" not in lines(whole["out"])[4]


def test_card_names_caches_and_recipe(whole, cache):
    from common.cache.layout import identity_sha256
    from common.cache.reader import CacheReader

    card = (Path(whole["model"]) / "README.md").read_text()
    assert identity_sha256(CacheReader(str(cache)).manifest) in card
    assert (
        "| l1/dpt | projector | 1 ce + 1 response_kl + 1 visual_kl + 0.5 relation | 0.006 | 3 | 4 | 24 |"
        in card
    )


def test_the_first_stage_leaves_the_language_model_alone(config):
    stopped = train(config.model_copy(update={"max_steps": 3}))
    assert not stopped["finished"]
    assert stopped["model"] is None
    assert train(config.model_copy(update={"max_steps": 3}))["steps"] == 3  # the same command adds none
    (checkpoint,) = sorted((Path(config.out) / "checkpoints").iterdir())[-1:]
    saved = load_file(checkpoint / "weights.safetensors")
    start = load_student(STUDENT)
    assert {start.part_of(name) for name in saved} == {"projector"}
    assert not any(saved[n].equal(v) for n, v in start.named_parameters() if n in saved)


def test_the_tower_never_changes(whole):
    start, end = load_student(STUDENT), load_student(whole["model"])
    towers = {name: value for name, value in start.named_parameters() if start.part_of(name) == "tower"}
    ends = dict(end.named_parameters())
    assert all(ends[name].equal(value) for name, value in towers.items())
    assert not any(
        ends[n].equal(v) for n, v in start.named_parameters() if "mlp" in n and start.part_of(n) == "llm"
    )


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_stopping_anywhere_changes_nothing(config, whole, stop):
    train(config.model_copy(update={"max_steps": stop}))
    resumed = train(config)
    assert resumed["finished"]
    assert same(weights(config.out), weights(whole["out"]))
    names = [name for name in lines(config.out)[0] if not name.endswith(("seconds", "second", "share"))]
    assert [[line.get(n) for n in names] for line in lines(config.out)] == [
        [line.get(n) for n in names] for line in lines(whole["out"])
    ]


def test_a_run_killed_before_the_model_was_saved_saves_it(config, whole, monkeypatch):
    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert train(config)["finished"]
    assert same(weights(config.out), weights(whole["out"]))


def test_learned_weights_are_resumed_and_reported(config, tmp_path):
    recipe = tmp_path / "learned.toml"
    recipe.write_text(
        'base = "tiny"\n[[levels]]\n'
        'stages = [{name = "dft", steps = 6, batch_size = 4, learned_weights = ["ce", "relation"]}]'
    )
    whole = config.model_copy(update={"recipe": str(recipe), "term_gradients": 2})
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    train(whole)
    train(parts.model_copy(update={"max_steps": 3}))
    train(parts)
    assert same(weights(whole.out), weights(parts.out))
    first, second = lines(whole.out)[:2]
    assert {name for name in first if name.startswith("pull/")} == {
        f"pull/{term}" for term in ("ce", "response_kl", "visual_kl", "relation")
    }
    assert not any(name.startswith("pull/") for name in second)
    last = lines(whole.out)[-1]
    assert last["weighted/response_kl"] == pytest.approx(last["raw/response_kl"])
    assert abs(last["weighted/ce"] / last["raw/ce"] - 1) > 1e-4


def test_adapters_resume_and_end_as_a_plain_model(config, tmp_path):
    pytest.importorskip("peft")
    adapted = config.model_copy(update={"lora_rank": 4})
    parts = adapted.model_copy(update={"out": str(tmp_path / "parts")})
    train(adapted)
    for stop in (2, 9):
        train(parts.model_copy(update={"max_steps": stop}))
    assert "lora_A" in str(load_file(next((tmp_path / "parts").rglob("weights.safetensors"))).keys())
    train(parts)
    assert same(weights(adapted.out), weights(parts.out))
    start = load_student(STUDENT)
    end = dict(load_student(str(Path(adapted.out) / "model")).named_parameters())
    assert end.keys() == dict(start.named_parameters()).keys()
    change = {name: (end[name] - value).detach() for name, value in start.named_parameters()}
    layer = change["model.model.language_model.layers.0.mlp.up_proj.weight"]
    assert 1 <= torch.linalg.matrix_rank(layer, atol=1e-5) <= 4
    assert not change["model.model.language_model.embed_tokens.weight"].any()


def test_a_finished_run_is_left_as_it_is(config, whole):
    again = config.model_copy(
        update={"out": whole["out"], "recipe": str(Path(whole["out"]).parent / "recipe.toml")}
    )
    before = (Path(whole["model"]) / "model.safetensors").stat().st_mtime_ns
    assert train(again)["finished"]
    assert (Path(whole["model"]) / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_place_is_refused(config):
    train(config.model_copy(update={"max_steps": 1}))
    with pytest.raises(TrainingError, match=r"seed: 0 -> 7"):
        train(config.model_copy(update={"seed": 7}))
    restarted = train(config.model_copy(update={"seed": 7, "restart": True, "max_steps": 1}))
    assert restarted["steps"] == 1


def test_micro_batches_change_rounding_only(config, whole):
    train(config.model_copy(update={"micro_batch": 1}))
    for ours, theirs in zip(lines(config.out), lines(whole["out"]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_bf16_is_near_fp32(config, whole):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(config.model_copy(update={"precision": "bf16", "max_steps": 3}))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for ours, theirs in zip(lines(config.out), lines(whole["out"]), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["loss"] != theirs["loss"]


def test_recomputed_activations_give_the_same_run(config, whole):
    train(config.model_copy(update={"gradient_checkpointing": True}))
    assert same(weights(config.out), weights(whole["out"]))


def test_a_batch_can_be_overfitted(config, tmp_path):
    recipe = tmp_path / "overfit.toml"
    recipe.write_text('base = "tiny"\n[[levels]]\nstages = [{name = "dft", steps = 40, batch_size = 4}]')
    train(config.model_copy(update={"recipe": str(recipe), "overfit_one_batch": True}))
    losses = [line["loss"] for line in lines(config.out)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_names_term_step_and_samples(config, monkeypatch):
    def poisoned(self, inputs):
        hidden = hidden_of(self, inputs)
        return (
            hidden * float("nan") if self.training and calls.append(1) is None and len(calls) > 2 else hidden
        )

    calls: list[int] = []
    hidden_of = Student.hidden
    monkeypatch.setattr(Student, "hidden", poisoned)
    with pytest.raises(TrainingError, match=r"stage l1/dpt, step 2: .*ce = nan in samples train-\d+"):
        train(config)
    checkpoints = list((Path(config.out) / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["00000002"]


def test_profile_and_tensorboard_leave_their_files(config, tmp_path):
    recipe = tmp_path / "eight.toml"
    recipe.write_text('base = "tiny"\n[[levels]]\nstages = [{name = "sft", steps = 8, batch_size = 2}]')
    changes = {"recipe": str(recipe), "profile": True, "tensorboard": True}
    train(config.model_copy(update=changes))
    assert "traceEvents" in json.loads((Path(config.out) / "profile.json").read_text())
    assert list((Path(config.out) / "tensorboard").glob("events.*"))


def test_a_cascade_carries_the_student_over(config, cache, tmp_path):
    recipe = tmp_path / "cascade.toml"
    recipe.write_text(
        'base = "tiny"\n[[levels]]\nstages = [{name = "dpt", steps = 2, batch_size = 2}]\n'
        '[[levels]]\nstages = [{name = "dft", steps = 2, batch_size = 2}]'
    )
    two = config.model_copy(update={"cache": (str(cache), str(cache)), "recipe": str(recipe)})
    assert list(train(two)["stages"]) == ["l1/dpt", "l2/dft"]


def test_a_run_finishes_its_step_saves_it_and_goes_on(config, whole, monkeypatch):
    taken = []
    step = StageTrainer.step

    def step_and_interrupt(self, inputs):
        report = step(self, inputs)
        taken.append(inputs.step)
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "step", step_and_interrupt)
        with pytest.raises(KeyboardInterrupt, match="step 5 of 12 is saved"):
            train(config)
    assert len(taken) == 5
    finished = train(config)
    assert finished["steps"] == 12
    assert same(weights(finished["out"]), weights(whole["out"]))
