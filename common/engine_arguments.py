"""`--engine-arg key=value`, as the dump and the doctor read it."""

import json
from collections.abc import Sequence
from typing import Any

_NUMBERS = ("cpu_offload_gb", "gpu_memory_utilization")
"""Arguments that are calculated with before vLLM sees them."""


def read_engine_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Names, with underscores, and their values: JSON where it parses, else text.

    Raises:
        ValueError: A pair is not key=value, or has no number where one is calculated with.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"--engine-arg {pair!r} is not key=value")
        found[key.strip().replace("-", "_")] = _value(text)
    for name in _NUMBERS:
        value = found.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--engine-arg {name} is {value!r}, wanted a number")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
