"""Flags win over the file, the file over defaults, and nothing unknown passes."""

import pytest
from pydantic import Field

from common.errors import ConfigError
from common.settings import load_settings
from schemas.base import Frozen
from teacher_dump.config import DumpConfig


class Settings(Frozen):
    """Bake a cake."""

    topk: int = Field(64, ge=1)
    """Tokens kept."""
    max_len: int = 4096
    """Longest sequence."""
    cache: tuple[str, ...] = ()
    """Caches, in order."""
    engine_arg: dict[str, str] = {}
    """Passed through."""
    fraction: float | None = None
    """Share."""
    dry_run: bool = False
    """Only plan."""


def load(argv: list[str]) -> Settings:
    return load_settings(Settings, argv, prog="bake")


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_hold_without_file_or_flags():
    assert load([]) == Settings()


def test_flags_take_lists_pairs_and_switches():
    got = load(
        [
            "--cache",
            "a",
            "--cache",
            "b",
            "--engine-arg",
            "x=1",
            "--engine-arg",
            "y=2",
            "--dry-run",
            "--fraction",
            "0.5",
        ]
    )
    assert got.cache == ("a", "b")
    assert got.engine_arg == {"x": "1", "y": "2"}
    assert got.dry_run
    assert got.fraction == 0.5


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "cascache.toml").write_text('[bake]\ntopk = 8\nmax-len = 99\ncache = ["z"]\n')
    got = load(["--topk", "16"])
    assert (got.topk, got.max_len, got.cache) == (16, 99, ("z",))


def test_environment_variables_are_not_settings(monkeypatch):
    monkeypatch.setenv("TOPK", "3")
    monkeypatch.setenv("topk", "3")
    assert load([]).topk == 64


def test_a_named_file_must_exist():
    with pytest.raises(ConfigError, match="does not exist"):
        load(["--config", "nowhere.toml"])


def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path):
    (tmp_path / "cascache.toml").write_text("[bake]\ntop_k = 8\n")
    with pytest.raises(ConfigError, match="did you mean topk"):
        load([])


def test_broken_toml_says_where(tmp_path):
    (tmp_path / "cascache.toml").write_text("[bake\n")
    with pytest.raises(ConfigError, match="line 1"):
        load([])


def test_a_value_out_of_range_names_the_flag():
    with pytest.raises(ConfigError, match=r"--topk: .*greater than or equal to 1.*'0'"):
        load(["--topk", "0"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sampling", "random", "--topk-mass", "0.5"], "--topk-mass goes with --sampling topk only"),
        (["--engine-arg", "nonsense"], "--engine-arg 'nonsense' is not key=value"),
        (
            ["--max-pixels", "big"],
            "--max-pixels: wanted a number of pixels such as 1003520 or 1.3MP, found 'big'",
        ),
    ],
)
def test_a_refused_setting_is_told_once_and_without_the_librarys_words(argv, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(DumpConfig, argv, prog="bake")
    assert str(caught.value) == f"{message}; see bake --help"


def test_what_the_reason_does_not_quote_is_quoted():
    with pytest.raises(
        ConfigError, match=r"^--topk: Input should be greater than or equal to 1 \(found '0'\);"
    ):
        load(["--topk", "0"])


def test_help_shows_docstrings_and_defaults(capsys):
    with pytest.raises(SystemExit):
        load(["--help"])
    text = capsys.readouterr().out
    assert "Bake a cake." in text
    assert "Tokens kept." in text
    assert "--max-len N" in text
    assert "64" in text


@pytest.mark.parametrize(
    "given", ["a,b/l1", '"quoted"/l1', "it's", "[x]", "{}", "a b", "", "null", 'x={"a": 1, "b": [2, 3]}']
)
def test_a_list_flag_takes_what_the_shell_passed(given):
    class Paths(Frozen):
        cache: tuple[str, ...] = ()
        """Paths."""

    assert load_settings(Paths, ["--cache", given, "--cache", "other"], prog="x").cache == (given, "other")
