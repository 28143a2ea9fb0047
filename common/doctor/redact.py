"""What a bug report must not contain: home directory, user and host names, tokens, passwords in addresses."""

import getpass
import os
import re
import socket
from pathlib import Path
from typing import Any, Final

_SECRET_NAME: Final = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|AUTH", re.I)
_SECRETS: Final = (
    (re.compile(r"\b(?:hf|sk|ghp|gho|github_pat|xox[bp])[_-][A-Za-z0-9_-]{8,}"), "<token>"),
    (re.compile(r"\bAKIA[0-9A-Z]{12,}"), "<token>"),
    (re.compile(r"\bBearer\s+\S+", re.I), "Bearer <token>"),
    (re.compile(r"((?:token|secret|password|api_?key)=)[^\s,]+", re.I), r"\1<secret>"),
    (re.compile(r"(?<=://)[^/\s@]+@"), "<login>@"),
)
_SHORTEST_NAME: Final = 3
"""Shorter user or host names occur in ordinary words."""
_COMMON_NAMES: Final = frozenset({"root", "user", "ubuntu", "localhost"})


def redact(text: str) -> str:
    """Text without names of the user or the machine, and without secrets."""
    for pattern, stand_in in _SECRETS:
        text = pattern.sub(stand_in, text)
    for name, stand_in in _private_names():
        text = re.sub(name, stand_in, text)
    return text


def redact_all(value: Any) -> Any:
    """JSON types with every text redacted, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(name)): redact_all(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(each) for each in value]
    return value


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def _private_names() -> list[tuple[str, str]]:
    """Patterns of private names, and their replacements."""
    home = str(Path("~").expanduser())
    found = [(_whole(home), "~")] if len(home) > 1 else []
    # in a path or before an @ only: a user name may also be an ordinary word
    found += [
        (rf"(?<=/){re.escape(name)}(?![A-Za-z0-9_])|\b{re.escape(name)}(?=@)", "<user>")
        for name in sorted({_user(), os.environ.get("USER", "")})
        if _is_telling(name)
    ]
    host = socket.gethostname()
    found += [(_whole(name), "<host>") for name in (host, host.partition(".")[0]) if _is_telling(name)]
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        return ""


def _whole(name: str) -> str:
    return rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])"


def _is_telling(name: str) -> bool:
    return len(name) >= _SHORTEST_NAME and name not in _COMMON_NAMES
