"""A leading `~` is the home directory, whichever way a path comes in."""

import pytest

from common.cache.cli import build_parser
from common.cache.cli import main as cascache
from common.cache.places import open_store
from common.doctor.config import DoctorConfig
from common.home import PATHS, expand_home, expand_homes
from common.settings import load_settings
from student_train.cli import main as student_train
from student_train.config import EvalConfig, TrainConfig
from teacher_dump.cli import main as teacher_dump
from teacher_dump.config import AuditConfig, DumpConfig


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home directory, and another one to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_only_a_leading_tilde_is_expanded(home):
    assert expand_home("~") == str(home)
    assert expand_home("~/x#number") == f"{home}/x#number"
    for kept in ("a/~/b", "./~", "s3://~/x", "~x://y", "~no-such-user/x", "shapes"):
        assert expand_home(kept) == kept


def test_only_paths_are_expanded(home):
    given = {"out": "~/x", "sample_id": "~/x", "sources": ["~/a", "b"], "data": None}
    assert expand_homes(given) == given | {"out": f"{home}/x", "sources": [f"{home}/a", "b"]}


@pytest.mark.parametrize("model", [DumpConfig, AuditConfig, TrainConfig, EvalConfig, DoctorConfig])
def test_every_path_of_every_command_is_expanded(model, home):
    names = sorted(PATHS & set(model.model_fields))
    flags = [text for name in names for text in ("--" + name.replace("_", "-"), "~/x")]
    needed = {"model", "data"} & set(names)
    assert needed
    settings = load_settings(model, flags, prog="any")
    for name in names:
        assert getattr(settings, name) in (f"{home}/x", (f"{home}/x",))


def test_the_settings_file_is_looked_up_at_home_too(home):
    (home / "my.toml").write_text('[teacher-dump]\nout = "~/l1"\n', encoding="utf-8")
    settings = load_settings(DumpConfig, ["--config", "~/my.toml"], prog="teacher-dump")
    assert settings.out == f"{home}/l1"


def test_a_store_is_opened_at_home(home):
    (home / "x").mkdir()
    (home / "x" / "file").write_bytes(b"here")
    assert open_store("~/x").read("file") == b"here"


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        (cascache, ["info", "~/x"]),
        (cascache, ["verify", "~/x"]),
        (cascache, ["show", "~/x", "a"]),
        (cascache, ["finalize", "~/x"]),
        (cascache, ["diff", "~/x", "~/x"]),
        (cascache, ["push", "~/x", "~/y"]),
        (teacher_dump, ["--status", "--out", "~/x"]),
        (student_train, ["--cache", "~/x", "--dry-run"]),
        (student_train, ["report", "~/x"]),
    ],
)
def test_all_commands_name_the_same_directory(run, arguments, home, capsys):
    assert run(arguments) != 0
    said = capsys.readouterr()
    assert f"{home}/x" in said.err + said.out
    assert "~" not in said.err + said.out
    assert not list((home.parent / "work").iterdir())


def test_every_path_argument_of_cascache_is_known():
    groups = build_parser()._subparsers._group_actions[0].choices.values()
    taken = {action.dest for command in groups for action in command._actions if action.type is None}
    others = {"help", "json", "expect", "quick", "sample_id", "samples", "level", "arrays", "strip_images"}
    others |= {"hidden_encoding", "image_grid", "max_pixels", "min_pixels", "odd_too", "profile"}
    assert taken - PATHS == others | {"relation_store", "strip_text"}
