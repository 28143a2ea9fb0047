"""JSONL of chat messages: one `{"id"?, "messages": [...], "images"?: [...]}` a line.

Message contents are text or lists of parts: `{"type": "text", "text"}`, `{"type": "image", "path"}`,
`{"type": "image_url", "image_url": {"url": "file:…"}}`, or a bare `{"type": "image"}` that takes the
next of the entry's `images`, as TRL writes them.
"""

import json
from collections.abc import Iterator
from typing import Any

from common.data.json_file import JsonFile, json_error


class MessagesJsonl(JsonFile):
    """A file of chat messages; blank lines are skipped."""

    def _scan(self) -> Iterator[tuple[int, int, Any]]:
        start = 0
        with self._file.open("rb") as file:
            for line in file:
                stop = start + len(line)
                if line.strip():
                    try:
                        entry = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise json_error(
                            file, str(self._file), start, f"found a line that is not JSON ({error})"
                        ) from error
                    yield start, stop, entry
                start = stop
