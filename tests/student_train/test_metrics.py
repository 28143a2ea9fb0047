import json

from student_train.metrics import Metrics, progress_bar, read_stage_ends, write_json


def where(total, stage="dpt"):
    return {"level": 1, "stage": stage, "step": total, "total_step": total}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_the_mean_of_its_steps(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", log_steps=2)
    for step, loss in enumerate([1.0, 3.0, 5.0, 5.0], start=1):
        metrics.add({"loss": loss}, where=where(step))
    assert [(line["total_step"], line["loss"]) for line in lines(tmp_path / "m.jsonl")] == [
        (2, 2.0),
        (4, 5.0),
    ]


def test_flushing_writes_what_is_left_once(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", log_steps=10)
    metrics.add({"loss": 1.0}, where=where(1))
    metrics.flush(where(1))
    metrics.flush(where(1))
    assert len(lines(tmp_path / "m.jsonl")) == 1


def test_resuming_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = Metrics(path, log_steps=1)
    for step in (1, 2, 3):
        metrics.add({"loss": 1.0}, where=where(step))
    with path.open("a") as file:
        file.write('{"total_step": 4, "lo')
    metrics.resume(2)
    assert [line["total_step"] for line in lines(path)] == [1, 2]


def test_trackers_get_every_line(tmp_path):
    class Tracker:
        def __init__(self):
            self.seen = []

        def log(self, values, step):
            self.seen.append((step, values))

    tracker = Tracker()
    Metrics(None, log_steps=1, accelerator=tracker).add({"loss": 2.0}, where=where(1))
    assert tracker.seen == [(1, {"loss": 2.0})]


def test_stage_ends_are_the_last_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = Metrics(path, log_steps=1)
    for step, stage in enumerate(["dpt", "dpt", "sft"], start=1):
        metrics.add({"loss": float(step)}, where=where(step, stage))
    assert {name: line["loss"] for name, line in read_stage_ends(path).items()} == {
        "l1/dpt": 2.0,
        "l1/sft": 3.0,
    }
    assert read_stage_ends(tmp_path / "none") == {}


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_value_that_some_steps_lack_is_the_mean_of_those_that_have_it(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", log_steps=4)
    for step, extra in enumerate([{}, {"pull/ce": 3.0}, {}, {}], start=1):
        metrics.add({"loss": float(step), **extra}, where=where(step))
    (line,) = lines(tmp_path / "m.jsonl")
    assert line["pull/ce"] == 3.0
    assert line["loss"] == 2.5


def test_a_log_gets_whole_lines_now_and_then(capsys):
    bar = progress_bar(1000, done=0, shown=True)
    for _ in range(1000):
        bar.update()
    bar.close()
    printed = capsys.readouterr().err
    assert 1 <= printed.count("\n") <= 4
    assert "1000/1000" in printed


def test_other_processes_show_nothing(capsys):
    progress_bar(5, done=0, shown=False).update()
    assert capsys.readouterr().err == ""
