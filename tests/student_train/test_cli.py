import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from student_train.cli import main
from tests.student_train.conftest import STUDENT

ROOT = Path(__file__).parents[2]


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys; from student_train.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'zarr', 'PIL', 'accelerate') if m in sys.modules])"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "--cache" in done.stdout
    assert time.perf_counter() - began < 5


def test_a_whole_run_prints_choices_and_a_summary(config, held_out, capsys, monkeypatch):
    flags = [
        *("--cache", config.cache[0], "--student", STUDENT, "--recipe", config.recipe, "--out", config.out),
        *("--eval", str(held_out), "--no-tensorboard", "--json", "--device", "cpu"),
    ]
    assert main(flags) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["finished"]
    assert set(summary["eval"]["kinds"]) <= {
        "colour",
        "compare",
        "count",
        "digit",
        "exist",
        "relation",
        "shape",
        "where",
    }
    assert printed.err.startswith(f"student-train: student {STUDENT}, cache {config.cache[0]}, data ")
    assert len((Path(config.out) / "answers.jsonl").read_text().splitlines()) == summary["eval"]["num"]

    assert main(["eval", "--model", summary["model"], "--data", str(held_out), "--limit", "6"]) == 0
    assert "exact match" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_makes_nothing(config, capsys):
    flags = ["--cache", config.cache[0], "--student", STUDENT, "--recipe", config.recipe, "--out", config.out]
    assert main([*flags, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "l1/dft" in printed
    assert "student fits" in printed
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache", "nowhere"], "nowhere"),
        (["--seed", "-1"], "--seed"),
        (["eval", "--model", "nowhere", "--data", "none.json"], "none.json does not exist"),
    ],
)
def test_errors_are_one_message_and_status_two(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("student-train: ")
    assert message in printed
    assert "Traceback" not in printed


def test_settings_come_from_the_file_in_the_working_directory(config, capsys, tmp_path, monkeypatch):
    (tmp_path / "cascache.toml").write_text(
        f'[student-train]\ncache = ["{config.cache[0]}"]\nstudent = "{STUDENT}"\nseed = 5\n'
    )
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    assert config.cache[0] in capsys.readouterr().out


def test_a_dry_run_looks_at_the_run_directory(config, capsys):
    flags = ["--cache", config.cache[0], "--recipe", config.recipe, "--out", config.out, "--dry-run"]
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "run.json").write_text('{"identity": {"seed": 5}}')
    assert main(flags) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert main([*flags, "--restart"]) == 0


def test_a_dry_run_as_json_is_json(config, capsys):
    assert main(["--cache", config.cache[0], "--recipe", config.recipe, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["total_steps"] == sum(stage["steps"] for stage in plan["stages"])
