"""Where a model's files are, without network access, and whether the hub can be reached.

directory                        as it is
hub id ──refs, snapshots──>      its snapshot in the hub's cache, or nothing
"""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from common.doctor.check import Check, Finding
from common.models import PRESETS, ModelRef

_SECONDS: Final = 5.0
_OFFLINE: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Directory that the hub's client keeps files in."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "hub"


def find_directory(ref: ModelRef, cache: Path) -> Path | None:
    """The model's directory, or its snapshot in the hub's cache; None where it is not on this machine."""
    if ref.revision is None:
        return Path(ref.path_or_id)
    repository = cache / f"models--{ref.path_or_id.replace('/', '--')}"
    named = repository / "refs" / ref.revision
    commit = named.read_text("ascii").strip() if named.is_file() else ref.revision
    place = repository / "snapshots" / commit
    return place if (place / "config.json").is_file() else None


def has_weights(directory: Path) -> bool:
    """Whether weights are beside the configuration."""
    return any(directory.glob("*.safetensors")) or any(directory.glob("*.bin"))


def guess_weights(ref: ModelRef, item: int) -> int | None:
    """Bytes of a preset's weights by its number of parameters; None for another model."""
    sizes = [each.size for each in PRESETS.values() if each.source == ref.path_or_id]
    return round(sizes[0] * 1e9 * item) if sizes else None


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the hub's client is set to offline mode."""
    return any(
        environment.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def check_hub(
    refs: Sequence[ModelRef],
    environment: Mapping[str, str] = os.environ,
    *,
    chosen: ModelRef | None = None,
    quick: bool = False,
) -> Check:
    """Whether the models that come from the hub are here or can be fetched; asks the network only for those.

    Args:
        refs: Teacher, and the student where it was named.
        environment: Of the process.
        chosen: The student, where it was not named: that it is absent is no fault of what was asked for.
        quick: Whether no model is loaded, so that a student that was not named is not needed.
    """
    found = _check_hub(refs if chosen is None else [*refs, chosen], environment)
    if chosen is None or found.status != "fail":
        return found
    named = _check_hub(refs, environment)
    if named.status == "fail":
        return named
    said = f"{found.found} (the default student of {refs[0].name}; choose one with --student)"
    if quick:
        return Check("hub", "skip", f"{said}; --quick loads no model", values=found.values)
    return replace(found, status="warn", found=said)


def _check_hub(refs: Sequence[ModelRef], environment: Mapping[str, str]) -> Check:
    wanted = [ref for ref in refs if ref.revision is not None]
    if not wanted:
        return Check("hub", "pass", "not needed: the models are directories", values={"asked": False})
    cache = hub_cache(environment)
    places = {ref.path_or_id: find_directory(ref, cache) for ref in wanted}
    absent = [name for name, place in places.items() if place is None or not has_weights(place)]
    if not absent:
        return Check("hub", "pass", f"in the cache: {', '.join(places)}", values={"asked": False})
    missing = ", ".join(absent)
    finding = Finding("hub", f"not in the cache: {missing}", "the files, or the hub", {"asked": False})
    if is_offline(environment):
        return replace(finding, found=f"{finding.found}; HF_HUB_OFFLINE is set").fails(
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or download elsewhere and give the directory"
        )
    address = environment.get("HF_ENDPOINT", "https://huggingface.co")
    problem = _ask(address)
    finding = replace(finding, values={"asked": True})
    if problem:
        said = f"{finding.found}; {address} does not answer: {problem}"
        return replace(finding, found=said).fails(
            "open the network or set a proxy, or give --model a directory"
        )
    return replace(finding, found=f"reachable; will be downloaded: {missing}").passes()


def _ask(address: str) -> str:
    """Why the hub does not answer; empty when it does."""
    if not address.startswith(("http://", "https://")):
        return "not an http address"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return str(error)
