import json

import pytest
import torch
from torch import nn

from common.errors import TrainingError
from student_train.checkpoint import (
    Checkpoints,
    Cursor,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    put_weights,
)

IDENTITY = {"seed": 0, "stages": [{"steps": 3}]}


def trained(steps, seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        walk(module, optimizer)
    return module, optimizer


def walk(module, optimizer):
    module(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimiser_goes_on_bit_for_bit(tmp_path):
    module, optimizer = trained(3)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(Cursor(1, 2, 3), dict(module.named_parameters()), optimizer_state(optimizer, module))
    walk(module, optimizer)

    other, fresh = trained(0, seed=1)
    found = Checkpoints(tmp_path, IDENTITY).latest()
    assert found.cursor == Cursor(1, 2, 3)
    weights, moments = load_tensors(found)
    put_weights(other, weights)
    load_optimizer_state(fresh, other, moments)
    walk(other, fresh)
    assert other.weight.equal(module.weight)
    assert other.bias.equal(module.bias)


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for step in range(5):
        checkpoints.save(Cursor(0, step, step), {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004"]
    assert checkpoints.latest().cursor.step == 4


def test_a_torn_checkpoint_does_not_exist(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(Cursor(0, 1, 1), {}, {})
    torn = tmp_path / ".tmp123"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.latest().cursor.step == 1
    checkpoints.save(Cursor(0, 2, 2), {}, {})
    assert not torn.exists()


def test_other_settings_are_refused_with_the_difference(tmp_path):
    Checkpoints(tmp_path, IDENTITY).save(Cursor(), {}, {})
    with pytest.raises(TrainingError, match=r"stages\.0\.steps: 3 -> 4\n.*--restart"):
        Checkpoints(tmp_path, {"seed": 0, "stages": [{"steps": 4}]}).latest()


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(TrainingError, match=r"holds weight \(2, 2\)"):
        put_weights(nn.Linear(4, 3), {"weight": torch.zeros(2, 2)})


def test_nothing_is_pickled(tmp_path):
    module, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(Cursor(0, 1, 1), dict(module.named_parameters()), optimizer_state(optimizer, module))
    names = sorted(path.name for path in (tmp_path / "00000001").iterdir())
    assert names == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    assert json.loads((tmp_path / "00000001" / "state.json").read_text())["identity"] == IDENTITY


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "none", IDENTITY).latest() is None
    Checkpoints(tmp_path / "none", IDENTITY).forget()
