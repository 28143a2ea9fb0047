import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import ConfigError
from student_train.cli import main
from student_train.report import chart, read_run, write_report


def make_run(directory: Path, terms: dict[str, list[str]], accuracy: float | None = None) -> Path:
    """A run of two lines a stage, whose metric is its total step."""
    directory.mkdir(parents=True)
    lines, total = [], 0
    for stage, names in terms.items():
        for step in (1, 2):
            total += 1
            values = {f"raw/{name}": float(total) for name in names}
            lines.append(
                {"level": 1, "stage": stage, "step": step, "total_step": total, "loss": 1.0, **values}
            )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    identity = {"student": "<b>tiny</b>", "seed": 0, "caches": {"l1": "x"}, "stages": [{"steps": total}]}
    (directory / "run.json").write_text(json.dumps({"identity": identity}))
    if accuracy is not None:
        scores = {"accuracy": accuracy, "kinds": {"colour": accuracy}}
        (directory / "eval.json").write_text(json.dumps(scores))
    return directory


class Links(HTMLParser):
    """Everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_lines_break_where_a_stage_lacks_the_term(tmp_path):
    run = read_run(make_run(tmp_path / "x", {"dpt": ["ce", "relation"], "sft": ["ce"], "dft": ["relation"]}))
    relation = chart("raw/relation", "relation", [run])
    assert [piece[0] for piece in relation.lines[0].split()] == ["M", "L", "M", "L"]
    assert relation.lines[0].endswith("320.0,0.0")
    assert relation.high == "6"
    assert len(relation.stages) == 2
    assert run.ends[-1] == ("l1/dft", ["–", "6"])


def test_a_page_of_two_runs_loads_nothing_and_escapes(tmp_path):
    runs = [
        make_run(tmp_path / "a", {"dpt": ["ce"]}, accuracy=0.5),
        make_run(tmp_path / "b", {"dpt": ["ce"]}, accuracy=0.25),
    ]
    page = write_report([str(run) for run in runs], tmp_path / "page" / "x.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "<b>tiny" not in page
    assert "&lt;b&gt;tiny" in page
    assert '<td class="best">50.0</td><td>25.0</td>' in page


def test_the_command_names_the_page(tmp_path, capsys):
    run = make_run(tmp_path / "a", {"dpt": ["ce"]})
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert str(run / "report.html") in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="found 0 runs"):
        write_report([], tmp_path / "x.html")
