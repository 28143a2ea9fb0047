"""`--engine-arg` means the same to the dump and to the doctor."""

import pytest

from common.doctor.cli import main as doctor
from common.engine_arguments import read_engine_arguments
from teacher_dump.cli import main as dump


def test_values_are_json_where_they_parse():
    found = read_engine_arguments(['a-b={"c": 1}', "flag=True", "name=text", "n=0.5", "path=a=b"])
    assert found == {"a_b": {"c": 1}, "flag": True, "name": "text", "n": 0.5, "path": "a=b"}


@pytest.mark.parametrize("share", ["0.01", "0.92", "1", "1.0"])
def test_a_share_of_the_memory_is_above_zero_and_at_most_one(share):
    assert read_engine_arguments([f"gpu-memory-utilization={share}"]) == {
        "gpu_memory_utilization": float(share)
    }


@pytest.mark.parametrize(
    "given",
    [
        "foo",
        "=1",
        "gpu_memory_utilization=much",
        "cpu_offload_gb=true",
        *(f"gpu_memory_utilization={each}" for each in ("0", "-0.5", "1.01", "92", "NaN", "1" + "0" * 400)),
        *(f"cpu_offload_gb={each}" for each in ("Infinity", "1e400", "-1", "1" + "0" * 400)),
        'other={"a": [NaN]}',
        "other=-Infinity",
        "other=" + "[" * 100_000,
    ],
)
def test_what_cannot_be_is_refused_by_both_commands(given, capsys):
    assert dump(["--model", "tiny", "--engine-arg", given, "--dry-run"]) == 2
    assert doctor(["--quick", "--engine-arg", given]) == 2
    said = capsys.readouterr().err
    assert said.count("--engine-arg") >= 2
    assert "Traceback" not in said
