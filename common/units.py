"""Sizes with units: `2GB`, `512 MiB`, `1.5e9`."""

import math
import re

from common.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1000**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, *, name: str) -> int:
    """Parse a size into bytes.

    Args:
        text: A number with or without a unit: B, kB, MB, GB, TB (powers of 1000), KiB … TiB (of 1024).
        name: The setting, for the message.

    Raises:
        ConfigError: The text is not a size.
    """
    found = _SIZE.fullmatch(text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"{name} is {text!r}; wanted a size such as 2GB, 512MiB or 2000000000")
    size = float(found[1]) * unit
    if size == math.inf:
        raise ConfigError(f"{name} is {text!r}, more than any disk holds")
    return int(size)
