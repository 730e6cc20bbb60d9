"""A hub on this machine that serves the files of one dataset repository, as far as `huggingface_hub` asks for them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4


@dataclass
class FakeHub:
    """What is served, and what was asked for.

    Attributes:
        files: contents by name.
        cut: how many bytes of a file are sent before the connection breaks, once per file.
        ranges: the first byte of every download, by name.
        url: the endpoint.
    """

    files: dict[str, bytes]
    cut: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, list[int]] = field(default_factory=dict)
    url: str = ""


@contextmanager
def serve(repository: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serve files at `<url>/datasets/<repository>/resolve/main/<name>`."""
    hub = FakeHub(files)
    prefix = f"/datasets/{repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.respond(body=False)

        def do_GET(self) -> None:
            self.respond(body=True)

        def respond(self, body: bool) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            content = hub.files.get(name)
            if content is None or not self.path.startswith(prefix):
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                hub.ranges.setdefault(name, []).append(start)
                self.send(content[start:], hub.cut.pop(name, None))

        def send(self, content: bytes, cut: int | None) -> None:
            self.wfile.write(content[:cut])
            self.close_connection = self.close_connection or cut is not None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
