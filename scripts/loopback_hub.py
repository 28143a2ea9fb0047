"""A tiny stand-in for the Hugging Face Hub on this machine: one dataset repository, files in memory.

It answers what `common.cache.hub` asks through `huggingface_hub`: listings, sizes, ranges, and commits of
files sent inline. Large-file uploads (LFS, Xet), access control and rate limits are not here.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Repository:
    """Files of the one branch, and its head."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.lock = threading.Lock()

    @property
    def head(self) -> str:
        """40 hex digits that change with every commit."""
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def commit(self, lines: list[dict[str, Any]]) -> int:
        """Apply one commit; returns the HTTP status."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.lock:
            if header.get("parentCommit", self.head) != self.head:
                return 412
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    self.files.pop(line["value"]["path"], None)
            self.commits += 1
            return 200

    def entry(self, path: str) -> dict[str, Any]:
        """A file as listings show it."""
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def tree(self, prefix: str, *, recursive: bool) -> list[dict[str, Any]]:
        """What lies below a prefix."""
        base, found = f"{prefix}/" if prefix else "", dict[str, dict[str, Any]]()
        for path in sorted(self.files):
            if path.startswith(base):
                name, _, rest = path.removeprefix(base).partition("/")
                if recursive or not rest:
                    found[path] = self.entry(path)
                else:
                    found[base + name] = {"type": "directory", "path": base + name, "oid": "0" * 40}
        return list(found.values())


@contextmanager
def serve_hub(repo: str = "team/caches") -> Iterator[tuple[str, Repository]]:
    """Serve an empty dataset repository until the block ends.

    Yields:
        The endpoint, and the repository behind it.
    """
    repository = Repository()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16

        def _answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"X-Repo-Commit": repository.head} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _missing(self) -> None:
            self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path, api = unquote(url.path), f"/api/datasets/{repo}"
            if path.startswith(f"{api}/tree/main"):
                prefix = path.removeprefix(f"{api}/tree/main").strip("/")
                found = repository.tree(prefix, recursive="recursive=true" in url.query.lower())
                self._answer(found) if found or not prefix else self._missing()
            elif path in (api, f"{api}/revision/main"):
                self._answer(
                    {"id": repo, "sha": repository.head, "siblings": [], "private": False, "tags": []}
                )
            else:
                self._range(path.removeprefix(f"/datasets/{repo}/resolve/main/"))

        def _range(self, name: str) -> None:
            if name not in repository.files:
                self._missing()
                return
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self._answer(repository.files[name][int(first) : int(last) + 1], 206)

        def do_POST(self) -> None:
            text = self._body().decode()
            if self.path.endswith("/paths-info/main"):
                wanted = parse_qs(text)["paths"]  # a form, not JSON
                self._answer([repository.entry(path) for path in wanted if path in repository.files])
            elif self.path.endswith("/preupload/main"):
                fields = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                files = [{"path": file["path"]} | fields for file in json.loads(text)["files"]]
                self._answer({"files": files})
            else:
                status = repository.commit([json.loads(line) for line in text.splitlines()])
                url = f"http://{self.headers['Host']}/datasets/{repo}/commit/{repository.head}"
                self._answer({"commitUrl": url, "commitOid": repository.head, "success": True}, status)

        def _body(self) -> bytes:
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", repository
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
