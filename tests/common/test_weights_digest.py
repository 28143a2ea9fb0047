"""The digest of weights is the one that caches carry, and is computed once for each state of the files."""

import hashlib
import os
from pathlib import Path

import pytest

from common import weights_digest
from common.weights_digest import files_state, hash_weights, weights_sha256


def plain(directory: Path) -> str:
    """The definition: one running hash over name, size and bytes, in name order."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files around the size of a chunk, an empty one among them."""
    directory = tmp_path / "model"
    directory.mkdir()
    chunk = weights_digest._CHUNK_BYTES
    for number, size in enumerate((0, 1, chunk - 1, chunk, chunk + 1, 11 * chunk + 5)):
        seed = number.to_bytes(1, "little")
        (directory / f"model-{number}.safetensors").write_bytes(hashlib.shake_128(seed).digest(size))
    return directory


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of a user who hashes small models, just written, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_digest, "WORTH_BYTES", 0)
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", 0.0)
    return tmp_path / "cache" / "cascache" / "weights.json"


def _unreadable(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, reading any weights fails."""

    def refuse(*_: object) -> bytes:
        raise AssertionError("hashed again")

    monkeypatch.setattr(weights_digest, "_read_at", refuse)


def test_reading_ahead_gives_the_plain_digest(model: Path):
    assert hash_weights(sorted(model.iterdir())) == plain(model)


def test_unchanged_files_are_not_read_again(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    first = weights_sha256(model)
    assert first == plain(model)
    _unreadable(model, monkeypatch)
    assert weights_sha256(model) == first


@pytest.mark.parametrize("how", ["touched", "rewritten", "set back", "replaced", "renamed", "moved", "added"])
def test_changed_files_are_hashed_again(how: str, model: Path, memory: Path):
    weights_sha256(model)
    file = model / "model-1.safetensors"
    stat = file.stat()
    if how == "touched":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    if how in ("rewritten", "set back"):
        file.write_bytes(b"?")
    if how == "set back":  # the same size and modification time: the status-change time tells
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_mtime_ns == stat.st_mtime_ns
    if how == "replaced":
        other = model.parent / "other"
        other.write_bytes(b"?")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(file)
    if how == "renamed":
        file.rename(model / "model-9.safetensors")
    if how == "moved":
        model = model.rename(model.with_name("elsewhere"))
    if how == "added":
        (model / "model-8.safetensors").write_bytes(b"8")
    assert weights_sha256(model) == plain(model)


def test_a_link_to_other_weights_is_another_state(model: Path, memory: Path, tmp_path: Path):
    link = tmp_path / "snapshot"
    link.mkdir()
    for file in model.iterdir():
        (link / file.name).symlink_to(file)
    assert weights_sha256(link) == plain(model)
    (link / "model-1.safetensors").unlink()
    (link / "model-1.safetensors").symlink_to(model / "model-3.safetensors")
    assert weights_sha256(link) == plain(link)


def test_the_memory_is_private_bounded_and_keeps_the_latest(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights_digest, "_MOST_ENTRIES", 3)
    for number in range(5):
        (model / "model-1.safetensors").write_bytes(bytes([number]))
        weights_sha256(model)
    known = weights_digest._recall(memory)
    assert len(known) == 3
    assert list(known)[-1] == files_state(sorted(model.iterdir()))
    assert memory.stat().st_mode & 0o777 == 0o600
    assert memory.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in memory.parent.iterdir()] == ["weights.json"]


@pytest.mark.parametrize("damage", ["garbage", "nested", "others may write", "no digest", "a list"])
def test_a_memory_that_cannot_be_trusted_is_not_used(damage: str, model: Path, memory: Path):
    weights_sha256(model)
    wrong = f'{{"{files_state(sorted(model.iterdir()))}": "{"0" * 64}"}}'
    memory.write_text(
        {
            "garbage": "{",
            "nested": "[" * 100_000,
            "no digest": wrong.replace("0" * 64, "zero"),
            "a list": "[]",
        }.get(damage, wrong)
    )
    if damage == "others may write":
        memory.chmod(0o666)
    assert weights_sha256(model) == plain(model)


@pytest.mark.parametrize("place", ["a file", "relative", "read-only"])
def test_without_a_memory_the_digest_is_the_same(
    place: str, model: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "root"
    root.write_text("") if place == "a file" else root.mkdir(mode=0o500)
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere" if place == "relative" else str(root))
    monkeypatch.chdir(tmp_path)
    assert weights_sha256(model) == plain(model)
    assert weights_sha256(model) == plain(model)
    assert not (tmp_path / "somewhere").exists()


def test_files_just_written_are_not_remembered(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", 60.0)
    assert weights_sha256(model) == plain(model)
    assert not memory.exists()


def test_small_weights_leave_no_trace(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_digest, "WORTH_BYTES", 1 << 40)
    assert weights_sha256(model) == plain(model)
    assert not memory.exists()
