"""Whether a model directory's weight files are complete, checked without reading a tensor.

    model.safetensors.index.json      names tensors and the shard that each is in
    model-00001-of-00003.safetensors  8 bytes: length of the header; the header: JSON; then the tensors
    model-00002-of-00003.safetensors

Loading finds the same faults minutes later, with another library's messages. Only headers are read:
a few megabytes for the largest models. A directory without any weights passes: not every command needs them.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import ConfigError

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(?P<kind>safetensors|bin)")
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library reads at most
_TENSOR_BYTES = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 2)
    | dict.fromkeys(("U32", "I32", "F32"), 4)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 8)
)
"""Bytes per number of the dtypes whose tensors' size is checked."""
_POINTER = b"version https://git-lfs"


def check_checkpoint(directory: Path) -> None:
    """Refuse a directory whose weight files are not all there, or not whole.

    Args:
        directory: A local model directory, or the snapshot directory of a hub model.

    Raises:
        ConfigError: An index that cannot be read or names a file that is not there, a set of shards with a
            number missing, a truncated file, a pointer of git-lfs; with the file's path.
    """
    safe = sorted(directory.glob("*.safetensors"))
    index, kind = directory / "model.safetensors.index.json", "safetensors"
    if not safe and not index.exists():  # hub snapshots carry the other kind's index without its files
        index, kind = directory / "pytorch_model.bin.index.json", "bin"
    shards = safe if kind == "safetensors" else sorted(directory.glob("*.bin"))
    places = read_index(index) if index.exists() else {}
    if places:
        _check_named(index, set(places.values()))
    _check_numbers(directory, {*(each.name for each in shards), *places.values()})
    _check_tensors(index, places, {each.name: _read_names(each) for each in shards})


def read_index(index: Path) -> dict[str, str]:
    """File of each tensor.

    Raises:
        ConfigError: It cannot be read, or names what is no file beside it.
    """
    try:
        found = json.loads(index.read_bytes())
        places = found["weight_map"]
        sound = bool(places) and all(isinstance(each, str) for each in places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is damaged ({error!r}); wanted JSON with a `weight_map` from tensors to files; "
            "copy or download it again"
        ) from error
    if not sound:
        raise ConfigError(f"{index} is damaged: its `weight_map` names no files; copy or download it again")
    outside = next(
        (each for each in places.values() if each in ("", ".", "..") or set(each) & set("/\\")), None
    )
    if outside is not None:
        raise ConfigError(
            f"{index} is damaged: it names {outside[:100]!r}, wanted files beside it, without a folder; "
            "copy or download it again"
        )
    return dict(places)


def _check_named(index: Path, names: set[str]) -> None:
    missing = sorted(name for name in names if not _is_file(index.parent / name))
    if missing:
        none = "none" if len(missing) == len(names) else f"{len(names) - len(missing)}"
        raise ConfigError(
            f"{index.parent} has {none} of the {len(names)} weight files that {index.name} names; "
            f"{_some(missing)} is not there; copy or download it again"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _check_numbers(directory: Path, names: Iterable[str]) -> None:
    """The names of shards contain their number."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            found.setdefault((match["stem"], match["count"], match["kind"]), set()).add(int(match["number"]))
    for (stem, count, kind), numbers in found.items():
        num_missing = int(count) - sum(1 <= number <= int(count) for number in numbers)
        if num_missing:
            first = next(number for number in range(1, int(count) + 1) if number not in numbers)
            name = f"{stem}-{first:0{len(count)}d}-of-{count}.{kind}"
            raise ConfigError(
                f"{directory} has {len(numbers)} of {int(count)} weight files: {_some([name], num_missing)} "
                "is neither there nor in an index; copy or download the model again"
            )


def _read_names(file: Path) -> frozenset[str] | None:
    """Names of a safetensors file's tensors; None for a file of another format, which is not read."""
    try:
        return _names_within(file)
    except FileNotFoundError as error:  # a hub snapshot links to files, which a clean-up may have removed
        raise ConfigError(
            f"{file} is a link to a file that is missing from the snapshot; download it again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror or error}), wanted a file of weights; "
            "copy or download it again, or check its permissions"
        ) from error


def _names_within(file: Path) -> frozenset[str] | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(len(_POINTER))
        if first == _POINTER:
            raise ConfigError(
                f"{file} is a git-lfs pointer, not the weights themselves; run `git lfs pull`, or download it"
            )
        if file.suffix != ".safetensors":
            return None
        length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else None
        if length is None or length > min(size - 8, _MOST_HEADER_BYTES):
            raise _not_whole(file, size, "which end within its header")
        stream.seek(8)
        header = _read_header(file, stream.read(length))
    wanted = 8 + length + max((each[1] for each in header.values()), default=0)
    if size != wanted:
        raise _not_whole(file, size, f"its header describes {wanted:,}")
    return frozenset(header)


def _read_header(file: Path, text: bytes) -> dict[str, tuple[int, int]]:
    """Range of bytes of each tensor, after the header."""
    try:
        found: dict[str, Any] = json.loads(text)
        ranges = {name: _range(each) for name, each in found.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no safetensors file: its header is not the JSON it should be "
            f"({type(error).__name__}); copy or download it again"
        ) from error
    end = 0
    for name, (start, stop) in sorted(ranges.items(), key=lambda each: each[1]):
        if start != end:
            raise _no_header(file, name, f"bytes {start:,} to {stop:,}, the tensor before ends at {end:,}")
        end = stop
    for name in ranges:
        tensor, held = found[name], ranges[name][1] - ranges[name][0]
        item = _TENSOR_BYTES.get(tensor["dtype"])
        if item is not None and held != (wanted := math.prod(tensor["shape"]) * item):
            raise _no_header(file, name, f"{held:,} bytes, its shape and dtype take {wanted:,}")
    return ranges


def _range(tensor: dict[str, Any]) -> tuple[int, int]:
    """A tensor's bytes, once its entry has the types it should have."""
    start, stop = tensor["data_offsets"]
    if not all(type(each) is int and each >= 0 for each in (start, stop, *tensor["shape"])) or stop < start:
        raise ValueError(tensor)
    if not isinstance(tensor["dtype"], str):
        raise TypeError(tensor)
    return start, stop


def _no_header(file: Path, name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{file} is no safetensors file: its header gives tensor {name[:200]} {what}; "
        "copy or download it again"
    )


def _not_whole(file: Path, size: int, what: str) -> ConfigError:
    return ConfigError(f"{file} is not whole: it has {size:,} bytes, {what}; copy or download it again")


def _check_tensors(index: Path, places: dict[str, str], tensors: dict[str, frozenset[str] | None]) -> None:
    """An index may not list tensors that its files do not contain."""
    absent = sorted(
        name for name, file in places.items() if (held := tensors.get(file)) is not None and name not in held
    )
    if absent:
        raise ConfigError(
            f"{index} does not fit the files beside it: {places[absent[0]]} holds no tensor {_some(absent)}; "
            "copy or download the model again"
        )


def _some(names: list[str], number: int | None = None) -> str:
    """The first of `number` names (by default all that are given), and how many more there are."""
    number = len(names) if number is None else number
    more = f" (and {number - 1:,} more)" if number > 1 else ""
    return f"{names[0][:300]}{more}"
