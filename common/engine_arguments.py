"""`--engine-arg key=value`, as the dump and the doctor read it."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "cpu_offload_gb": (lambda value: 0 <= value < 1e6, "a number of GiB, 0 or more"),
    "gpu_memory_utilization": (lambda value: 0 < value <= 1, "a share above 0 and at most 1, such as 0.9"),
}
"""Arguments that are calculated with before vLLM sees them."""


def read_engine_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Names, with underscores, and their values: JSON where it parses, else text.

    Raises:
        ValueError: A pair is not key=value, has a number that is not finite, or has no number in the range
            of an argument that is calculated with.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"--engine-arg {pair!r} is not key=value")
        name = key.strip().replace("-", "_")
        found[name] = _value(text)
        if not _is_finite(found[name]):
            raise ValueError(f"--engine-arg {name} is {text[:100]}, wanted finite numbers")
    for name, (is_in_range, wanted) in _NUMBERS.items():
        if name not in found:
            continue
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_in_range(value):
            raise ValueError(f"--engine-arg {name} is {str(value)[:100]}, wanted {wanted}")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
    except RecursionError as error:
        raise ValueError(f"--engine-arg {text[:100]}… is nested too deeply, wanted JSON or text") from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
