"""A minimal Hugging Face hub for the real client: it makes repositories and remembers commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """Received data: repositories as they were asked for, and per repository path → content."""

    url: str
    fails: bool = False
    repos: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.repos.append(asked)
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            return {"url": f"{self.url}/{kind}{asked.get('organization', 'me')}/{asked['name']}"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if "/commit/" in path:
            repo = "/".join(path.split("/")[2:5])
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.files.setdefault(repo, {})[item["value"]["path"]] = content
            return {"commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo}/commit/0", "success": True}
        return {"errors": [], "warnings": []}  # the check of a card's header


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub for the duration of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            hub.tokens.add(self.headers.get("authorization", ""))
            reply = json.dumps({"error": "no"} if hub.fails else hub.answer(self.path, body)).encode()
            self.send_response(403 if hub.fails else 200)
            self.send_header("content-length", str(len(reply)))
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
