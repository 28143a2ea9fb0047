"""Weight files that are not all there, or not whole, are refused before anything is loaded."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.checkpoint_files import check_checkpoint
from common.errors import ConfigError
from common.models import TINY
from teacher_dump.cli import main as dump_main

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The tiny teacher, its weights in three shards with an index, as save_pretrained writes large ones."""
    model = tmp_path / "model"
    shutil.copytree(TINY / "tiny-l1", model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    places = {name: SHARDS[number % 3] for number, name in enumerate(sorted(weights))}
    for shard in SHARDS:
        mine = {name: weights[name] for name, place in places.items() if place == shard}
        save_file(mine, model / shard, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model


def _edit(model: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def _cut(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def _drop_shard_everywhere(model: Path) -> None:
    (model / SHARDS[1]).unlink()
    _edit(model, lambda places: [places.pop(n) for n, f in list(places.items()) if f == SHARDS[1]] and None)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing-shard": (lambda m: (m / SHARDS[1]).unlink(), f"2 of the 3 weight files .* {SHARDS[1]} is not"),
    "no-shards": (
        lambda m: [(m / shard).unlink() for shard in SHARDS],
        r"none of the 3 weight files .* \(and 2 more\) is not there",
    ),
    "torn-index": (lambda m: _cut(m / INDEX, 100), f"{INDEX} is damaged"),
    "empty-index": (lambda m: _cut(m / INDEX, 0), f"{INDEX} is damaged"),
    "index-of-another-shape": (lambda m: (m / INDEX).write_text("[1, 2]"), f"{INDEX} is damaged"),
    "index-without-files": (lambda m: (m / INDEX).write_text('{"weight_map": {}}'), "names no files"),
    "index-of-numbers": (lambda m: (m / INDEX).write_text('{"weight_map": {"a": 1}}'), "names no files"),
    "incomplete-index": (_drop_shard_everywhere, f"2 of 3 weight files: {SHARDS[1]} is neither"),
    "path-outside": (
        lambda m: _edit(m, lambda places: places.update(a="../x")),
        "names '../x', wanted files",
    ),
    "absolute-path": (lambda m: _edit(m, lambda places: places.update(a="/etc/x")), "names '/etc/x'"),
    "parent": (lambda m: _edit(m, lambda places: places.update(a="..")), "names '..'"),
    "name-too-long": (
        lambda m: _edit(m, lambda places: places.update(a="x" * 5000)),
        "x is not there|x+ is not",
    ),
    "deep-index": (lambda m: (m / INDEX).write_text("[" * 100_000), f"{INDEX} is damaged"),
    "dangling-link": (
        lambda m: (m / "extra.safetensors").symlink_to(m / "gone"),
        "missing from the snapshot; download it again",
    ),
    "folder": (lambda m: (m / "extra.safetensors").mkdir(), "cannot be read"),
    "millions": (
        lambda m: shutil.copy(m / SHARDS[0], m / "model-00001-of-9999999.safetensors"),
        r"model-0000002-of-9999999.safetensors \(and 9,999,997 more\)",
    ),
    "unknown-tensor": (
        lambda m: _edit(m, lambda places: places.update({"a.b": SHARDS[0]})),
        f"{SHARDS[0]} holds no tensor a.b",
    ),
    "cut-data": (lambda m: _cut(m / SHARDS[2], (m / SHARDS[2]).stat().st_size - 1), "00003.* is not whole"),
    "cut-header": (lambda m: _cut(m / SHARDS[2], 50), "not whole: it has 50 bytes"),
    "empty-shard": (lambda m: _cut(m / SHARDS[2], 0), "not whole: it has 0 bytes"),
    "longer": (
        lambda m: (m / SHARDS[2]).write_bytes((m / SHARDS[2]).read_bytes() + b"x"),
        "not whole: it has .* its header describes",
    ),
    "no-safetensors": (lambda m: (m / SHARDS[0]).write_bytes(bytes(8) + b"x" * 99), "is no safetensors"),
    "pointer": (
        lambda m: (m / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "git-lfs pointer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused_with_the_file_named(fault: str, sharded: Path):
    check_checkpoint(sharded)
    damage, words = FAULTS[fault]
    damage(sharded)
    with pytest.raises(ConfigError, match=words) as refused:
        check_checkpoint(sharded)
    assert str(sharded) in str(refused.value)
    assert "\n" not in str(refused.value)


def _file(path: Path, header: str, num_bytes: int) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(num_bytes))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ('"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', ""),
        (
            '"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, '
            '"b": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}',
            "",
        ),
        ('"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}', ""),
        (
            '"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}',
            "8 bytes, its shape and dtype take 12",
        ),
        ('"a": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}', "the tensor before ends at 0"),
        (
            '"a": {"dtype": "I8", "shape": [6], "data_offsets": [0, 6]}, '
            '"b": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}',
            "tensor b .* before ends at 6",
        ),
        ('"a": {"dtype": "I8", "shape": [8], "data_offsets": [8, 0]}', "is no safetensors file"),
        ('"a": {"dtype": "I8", "shape": [8], "data_offsets": [-8, 0]}', "is no safetensors file"),
        ('"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 1e400]}', "is no safetensors file"),
        ('"a": {"dtype": "I8", "shape": [-2, -4], "data_offsets": [0, 8]}', "is no safetensors file"),
        ('"a": {"dtype": [], "shape": [8], "data_offsets": [0, 8]}', "is no safetensors file"),
        ('"a": {"dtype": "I8", "shape": 8, "data_offsets": [0, 8]}', "is no safetensors file"),
        ('"a": ' + "[" * 100_000, "is no safetensors file"),
    ],
)
def test_a_header_has_to_describe_the_bytes_one_tensor_after_another(
    tensors: str, words: str, tmp_path: Path
):
    _file(tmp_path / "model.safetensors", "{" + tensors + "}", 8)
    if not words:
        check_checkpoint(tmp_path)
        return
    with pytest.raises(ConfigError, match=words):
        check_checkpoint(tmp_path)


def test_whole_checkpoints_of_every_form_pass(sharded: Path, tmp_path: Path):
    for name in ("tiny-l1", "tiny-l2", "tiny-student"):
        check_checkpoint(TINY / name)
    (sharded / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    check_checkpoint(sharded)  # hub snapshots hold the other form's index without its files
    (sharded / "consolidated.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    check_checkpoint(sharded)
    empty = tmp_path / "configuration-only"
    empty.mkdir()
    check_checkpoint(empty)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_teacher_dump_refuses_before_the_engine_starts(
    flags: list[str], sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (sharded / SHARDS[1]).unlink()
    out = tmp_path / "out"
    assert dump_main(["--model", str(sharded), "--limit", "4", "--out", str(out), *flags]) == 2
    assert f"{SHARDS[1]} is not there" in capsys.readouterr().err
    assert not out.exists()
