"""LLaVA JSON: one array of `{"id", "image", "conversations"}`, a gigabyte for the 665k mix.

The array is walked with the C decoder's `raw_decode` over a sliding window, which yields each entry
and where it ends in one pass; an event parser (ijson) gives neither byte ranges nor that speed. The
window is decoded as Latin-1, so that characters are bytes; entries that are not ASCII are parsed
again as UTF-8.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from common.data.json_file import JsonFile, json_error
from common.errors import DataError

WINDOW_BYTES = 4 * 2**20
MAX_ENTRY_BYTES = 256 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff".encode().decode("latin-1")
_LONGEST_LITERAL = 16


class LlavaJson(JsonFile):
    """A LLaVA conversation file; see `common.data.entries` for what an entry may hold."""

    def _scan(self) -> Iterator[tuple[int, int, Any]]:
        with self._file.open("rb") as file:
            yield from scan_array(file, name=str(self._file))


def scan_array(
    file: BinaryIO, *, name: str, window_bytes: int = WINDOW_BYTES
) -> Iterator[tuple[int, int, Any]]:
    """Every element of a top-level JSON array: first byte, one past the last byte, value.

    Args:
        file: Binary, seekable, at its start.
        name: For messages.
        window_bytes: How much is read at a time.

    Raises:
        DataError: `json`: no array, broken syntax or a cut file, with line and byte.
    """
    window = _Window(file, name, window_bytes)
    window.skip(_BOM)
    if not window.skip("["):
        raise window.broken("found no [; wanted one JSON array of entries (one entry a line is .jsonl)")
    if not window.skip("]"):
        yield window.element()
        while window.skip(","):
            yield window.element()
        if not window.skip("]"):
            raise window.broken("wanted , or ] after an entry")
    window.skip("")
    if window.rest:
        raise window.broken("found more text after the array's closing ]")


class _Window:
    """The part of the file being read, from byte `at`; reading stands at `text[place]`."""

    def __init__(self, file: BinaryIO, name: str, window_bytes: int) -> None:
        self.file, self.name, self.window_bytes = file, name, window_bytes
        self.decoder = json.JSONDecoder()
        self.text, self.place, self.at = "", 0, 0
        self.more()

    @property
    def rest(self) -> int:
        """Characters not yet read."""
        return len(self.text) - self.place

    def more(self) -> bool:
        """Read on, doubling when one entry fills the window; false at the end of the file."""
        chunk = self.file.read(max(self.window_bytes, self.rest)).decode("latin-1")
        if chunk:
            self.text = self.text[self.place :] + chunk
            self.at, self.place = self.at + self.place, 0
        return bool(chunk)

    def skip(self, mark: str) -> bool:
        """Skip white space, then `mark` if it is there."""
        while True:
            found = _SPACE.match(self.text, self.place)
            assert found is not None
            self.place = found.end()
            if self.rest >= max(1, len(mark)) or not self.more():
                break
        if not self.text.startswith(mark, self.place):
            return False
        self.place += len(mark)
        return True

    def element(self) -> tuple[int, int, Any]:
        """Byte range and value of the element that comes next."""
        self.skip("")
        value, stop = self.decode()
        # A number may go on past the window: 1, 1.5 and 1e+5 all start with 1.
        while isinstance(value, int | float) and len(self.text) - stop < 4 and self.more():
            value, stop = self.decode()
        raw = self.text[self.place : stop]
        start = self.at + self.place
        if not raw.isascii():
            try:
                value = json.loads(raw.encode("latin-1"))
            except UnicodeDecodeError as error:
                self.place += error.start
                raise self.broken(f"found a byte that is not UTF-8 ({error.reason})") from error
        self.place = stop
        return start, self.at + stop, value

    def decode(self) -> tuple[Any, int]:
        while True:
            try:
                return self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LONGEST_LITERAL
                if cut and self.rest < MAX_ENTRY_BYTES and self.more():
                    continue
                self.place = error.pos
                raise self.broken(error.msg) from error
            except RecursionError as error:
                raise self.broken("found an entry nested too deeply") from error

    def broken(self, found: str) -> DataError:
        return json_error(self.file, self.name, self.at + self.place, found)
