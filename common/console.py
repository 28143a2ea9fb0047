"""What every command does to its terminal before it prints anything."""

import sys


def escape_unprintable() -> None:
    """Print escapes for what the terminal's encoding lacks, as under `LC_ALL=C`, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a test or a notebook may have put another object there
            reconfigure(errors="backslashreplace")
