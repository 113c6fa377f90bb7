"""A hub of our own on 127.0.0.1: serves a folder as a model repository, and can be told to behave badly.

Speaks the two addresses that a download needs: the list of files at a commit, and a file at a commit, with ranges.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`folder` is what the repository holds. The rest is misbehaviour, and what was asked so far."""

    folder: Path
    address: str = ""
    commit: str = COMMIT
    cut: dict[str, list[int]] = field(default_factory=dict)  # path -> bytes after which the next answers break off
    corrupt: dict[str, int] = field(default_factory=dict)  # path -> how many answers have a wrong byte
    status: dict[str, list[int]] = field(default_factory=dict)  # path -> statuses of the next answers
    extra: list[dict[str, Any]] = field(default_factory=list)  # more entries of the file list
    ranges: bool = True
    stall: threading.Event | None = None  # set: answers wait in the middle for it
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def files(self) -> dict[str, bytes]:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path, data in self.files().items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data)}
            entry["blobId"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if path.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": "x/y", "sha": self.commit, "siblings": siblings + self.extra}

    def paths(self) -> list[str]:
        """The files asked for, in order."""
        return [path.split("/resolve/")[1].partition("/")[2] for path, _ in self.asked if "/resolve/" in path]


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            if self.path.startswith("/api/models/"):
                self._send(200, json.dumps(hub.listing()).encode(), "api")
                return
            path = self.path.split("/resolve/")[1].partition("/")[2]
            if hub.status.get(path):
                self._send(hub.status[path].pop(0), b"", "")
                return
            data = hub.files()[path]
            if hub.corrupt.get(path, 0) > 0:
                hub.corrupt[path] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            begin = self.headers.get("Range", "bytes=0-")[len("bytes=") :].rstrip("-")
            if hub.ranges and int(begin):
                self._send(206, data[int(begin) :], path, f"bytes {begin}-{len(data) - 1}/{len(data)}")
            else:
                self._send(200, data, path)

        def _send(self, status: int, data: bytes, path: str, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            cuts = hub.cut.get(path)
            if cuts:
                self.wfile.write(data[: cuts.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
            elif hub.stall and path != "api" and len(data) > 1000:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                hub.stall.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        if hub.stall:
            hub.stall.set()
        server.shutdown()
        server.server_close()
