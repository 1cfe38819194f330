"""A small local OpenAI-compatible server that misbehaves as a test configures it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[
    [dict[str, Any], int], Any
]  # (request body, number of the call from 0) → argument of `answer`


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.busy = self.most_busy = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send(200, b'{"data": []}', {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["authorization"])
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            self.answer(self.server.behaviour(body, number))
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def answer(self, form: Any) -> None:
        """Send an answer of one of these forms.

        A text → a completion; {"status", "headers", "words"} → an error; {"raw"} → these bytes;
        {"reset"} → the connection drops; {"blanks"} → that many blanks, a tenth of a second apart,
        before the rest.
        """
        if isinstance(form, str):
            return self.send(200, json.dumps(completion(form)).encode(), {})
        if form.get("reset"):
            self.close_connection = True
            return self.connection.close()
        if "blanks" in form:
            return self.trickle(form["blanks"])
        if "raw" in form:
            return self.send(form.get("status", 200), form["raw"], form.get("headers", {}))
        if "completion" in form:
            return self.send(200, json.dumps(form["completion"]).encode(), {})
        error = {"error": {"message": form.get("words", "no")}}
        return self.send(form["status"], json.dumps(error).encode(), form.get("headers", {}))

    def send(self, status: int, payload: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(payload)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def trickle(self, blanks: int) -> None:
        self.send_response(200)
        self.send_header("content-length", str(blanks + 2))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(blanks):
                self.wfile.write(b" ")
                time.sleep(0.1)
            self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None: ...


def completion(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


@contextmanager
def serve(behaviour: Behaviour) -> Iterator[Server]:
    server = Server(behaviour)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def slowly(seconds: float, then: Any) -> Any:
    time.sleep(seconds)
    return then
