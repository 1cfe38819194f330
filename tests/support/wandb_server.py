"""A minimal W&B server for the real client: it accepts and remembers runs, history and artifacts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

KEY = "k" * 40


@dataclass
class Server:
    """Received data: one dict per run, history rows, the summary, and (name, type) of artifacts."""

    port: int
    runs: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": KEY}

    def answer(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            self.runs.append(asked)
            project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "us"}}
            run = {
                "id": "r",
                "name": asked["name"],
                "displayName": "",
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"http://127.0.0.1:{self.port}/put"} for name in asked["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            self.artifacts.append(
                (asked["input"]["artifactCollectionName"], asked["input"]["artifactTypeName"])
            )
            latest = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            return {
                "createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": latest}}
            }
        if "query ArtifactType" in query:
            return {"project": None}
        return {
            "viewer": {"id": "v", "entity": "us", "username": "u", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": {"features": []},
        }

    def stream(self, files: dict[str, Any]) -> None:
        self.history += [json.loads(row) for row in files.get("wandb-history.jsonl", {}).get("content", [])]
        for row in files.get("wandb-summary.json", {}).get("content", []):
            self.summary = json.loads(row)


@contextmanager
def serve(port: int = 0) -> Iterator[Server]:
    """A server for the duration of the block; with the `port` of an earlier one, that server is up again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            text = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            reply: dict[str, Any] = {}
            if self.path == "/graphql":
                request = json.loads(text)
                reply = {"data": server.answer(request["query"], request.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(json.loads(text).get("files") or {})
            self.reply(json.dumps(reply).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.reply(b"{}")

        do_GET = do_PUT

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    found = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    found.daemon_threads = True
    server = Server(found.server_address[1])
    Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        found.shutdown()
        found.server_close()
