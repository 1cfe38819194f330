"""Fuzz of the API client: random servers over real HTTP; nothing may be lost, and nothing paid twice.

    python benchmarks/odd_inputs/servers.py [--seeds 20] [--questions 40]

Every seed draws a server: whether it refuses `n`, `response_format` or long prompts, with which status, and
how often it fails, in which of a dozen ways.  A teacher and a model under test request the same answers in
two starts; in the second the server has no faults.  Then

    lost     questions without a text and without a reason, or with another question's text
    twice    answers that the server delivered more often than once
    cost     tokens that the client has booked and the server has not delivered, or the reverse

must all be 0.  The exit code is 1 if one is not.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import ENGINE, EndpointGenerator
from pgenrm_train.backends.protocols import GenerationRequest
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.rewards.judging import SCHEMA

SAMPLES, LONG, TIMEOUT = 3, 400, 5.0
FIELD_STATUSES = (400, 404, 422, 500, 501)
FAULTS = (
    "busy",
    "date",
    "broken",
    "reset",
    "page",
    "stream",
    "error",
    "short",
    "cut",
    "blank",
    "thoughts",
    "slow",
)
FORMS = ("text", "parts", "think", "closed", "usage")


@dataclass
class Quirks:
    """One server, drawn from a seed."""

    rng: random.Random
    fault_rate: float
    refuses: dict[str, int] = field(default_factory=dict)  # field → status
    ignores_n: bool = False
    slow: bool = True

    @classmethod
    def draw(cls, seed: int, slow: bool) -> "Quirks":
        rng = random.Random(seed)
        names = ("n", "response_format", "long")
        refuses = {name: rng.choice(FIELD_STATUSES) for name in names if rng.random() < 0.5}
        if "long" in refuses:
            refuses["long"] = rng.choice((400, 413, 422))
        return cls(rng, rng.choice((0.0, 0.1, 0.3)), refuses, rng.random() < 0.2, slow)


class Server(ThreadingHTTPServer):
    """Counts what it delivers, by question and seed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, quirks: Quirks) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.quirks, self.lock = quirks, threading.Lock()
        self.delivered: Counter[tuple[str, int]] = Counter()
        self.tokens = self.calls = 0
        self.faults: Counter[str] = Counter()

    def draw(self) -> tuple[str, str]:
        """The fault of one call, or none, and the form of its answer."""
        with self.lock:
            self.calls += 1
            rng = self.quirks.rng
            fault = rng.choice(FAULTS) if rng.random() < self.quirks.fault_rate else ""
            fault = "" if fault == "slow" and not self.quirks.slow else fault
            self.faults[fault] += 1
            return fault, rng.choice(FORMS)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault, form = self.server.draw()
        question = body["messages"][-1]["content"]
        refused = [name for name in self.server.quirks.refuses if name in body]
        if len(question) > LONG and "long" in self.server.quirks.refuses:
            refused.append("long")
        if refused:
            return self.send(
                self.server.quirks.refuses[refused[0]], {"error": {"message": f"no {refused[0]}"}}
            )
        if self.failed(fault):
            return None
        several = 1 if self.server.quirks.ignores_n else body.get("n", 1)
        name = question.split()[0]
        choices = [self.choice(f"{name}/{body['seed'] + i}", form, fault) for i in range(several)]
        spent = {"prompt_tokens": len(name), "completion_tokens": 7 * several}
        with self.server.lock:
            self.server.tokens += sum(spent.values())
            for i in range(several):
                self.server.delivered[name, body["seed"] + i] += 1
        usage = {key: str(count) for key, count in spent.items()} if form == "usage" else spent
        return self.send(200, {"choices": choices, "usage": usage})

    def failed(self, fault: str) -> bool:
        """Answer with a fault that costs nothing; False if there is none."""
        wait = {"busy": "0", "date": formatdate(time.time() - 5, usegmt=True)}.get(fault)
        if wait is not None:
            self.send(429, {"error": {"message": "busy"}}, {"retry-after": wait})
        elif fault == "broken":
            self.send(503, {"detail": "broken"})
        elif fault == "reset":
            self.close_connection = True
            self.connection.close()
        elif fault == "page":
            self.write(200, b"<html><title>Log in</title></html>", {})
        elif fault == "stream":
            self.write(200, b"data: {}\n\ndata: [DONE]\n\n", {})
        elif fault == "error":
            self.send(200, {"error": {"message": "upstream", "code": 502}})
        elif fault == "short":
            self.close_connection = True
            self.write(200, b'{"choices": [{"mess', {"content-length": "5000"})
        elif fault == "slow":
            time.sleep(TIMEOUT + 1)
            self.close_connection = True
        else:
            return False
        return True

    def choice(self, text: str, form: str, fault: str) -> dict[str, Any]:
        content: Any = {
            "parts": [{"type": "text", "text": text}],
            "think": f"<think>not {text}0</think>\n{text}",
            "closed": f"hm</think>{text}",
        }.get(form, text)
        message = {"role": "assistant", "content": content}
        if fault in ("blank", "thoughts"):
            message = {"role": "assistant", "content": None}
            message |= {"reasoning_content": "hm"} if fault == "thoughts" else {}
        return {"index": 0, "finish_reason": "length" if fault == "cut" else "stop", "message": message}

    def send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        self.write(status, json.dumps(answer).encode(), headers or {})

    def write(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(quirks: Quirks) -> Iterator[Server]:
    server = Server(quirks)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def messages(question: int) -> tuple[dict[str, str], ...]:
    filling = "word " * (LONG if question % 4 == 0 else 1)
    return ({"role": "system", "content": "Answer."}, {"role": "user", "content": f"q{question} {filling}"})


def settings(server: Server) -> EndpointConfig:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return EndpointConfig(
        base_url=url,
        kind="endpoint",
        name="m",
        attempts=3,
        timeout_seconds=TIMEOUT,
        max_in_flight=8,
        give_up_after=1000,
    )


def teacher(server: Server, questions: int, folder: Path) -> Counter[str]:
    """Threads that request structured answers, in two starts."""
    problems: Counter[str] = Counter()
    asked = [(q, s) for q in range(questions) for s in range(SAMPLES)]
    for start in range(2):
        one = Endpoint(settings(server), folder)
        with ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(one.complete, messages(q), sample=s, schema=SCHEMA) for q, s in asked]
            replies = [call.result() for call in calls]
        for (question, sample), reply in zip(asked, replies, strict=True):
            right = reply.text == f"q{question}/{sample}" and reply.failure is None
            problems["lost"] += not (right or (reply.text is None and bool(reply.failure)))
            late = start == 1 and reply.failure not in (None, *limits.WORKING)
            problems["lost"] += late  # the server has no faults now
        problems["cost"] += abs(sum(one.usage.paid) - server.tokens)
        one.close()
        server.quirks.fault_rate = 0.0
    return problems


def model(server: Server, questions: int, folder: Path) -> Counter[str]:
    """The queue of a model under test, in two starts; the second requests what the first did not get."""
    problems: Counter[str] = Counter()
    missing = {(q, s) for q in range(questions) for s in range(SAMPLES)}
    for _ in range(2):
        one = EndpointGenerator(Endpoint(settings(server), folder))
        requests = []
        for question in range(questions):
            seeds = sorted(seed for q, seed in missing if q == question)
            together = len(seeds) == SAMPLES
            requests += [
                GenerationRequest(f"q{question}", messages(question), SAMPLES if together else 1, seed)
                for seed in (seeds[:1] if together else seeds)
            ]
        expected = Counter((r.key, r.seed + i) for r in requests for i in range(r.samples))
        firsts = {}
        try:
            for key, seed, answer in _answers(one, requests):
                expected[key, seed] -= 1
                right = answer.text == f"{key}/{seed}" and answer.failure in (None, "length")
                problems["lost"] += not (right or (answer.text is None and bool(answer.failure)))
                firsts[key, seed] = answer
        except BackendError:
            problems["lost"] += 1
        problems["lost"] += sum(map(abs, expected.values()))
        done = {k for k, a in firsts.items() if not (a.failure or "").startswith(ENGINE)}
        missing -= {(int(key[1:]), seed) for key, seed in done}
        problems["cost"] += abs(sum(one.endpoint.usage.paid) - server.tokens)
        one.close()
        server.quirks.fault_rate = 0.0
    problems["lost"] += len(missing)
    return problems


def _answers(one: EndpointGenerator, requests: list[GenerationRequest]) -> Iterator[tuple[str, int, Any]]:
    """(key, seed of the sample, generation); requests of one question differ by their seed."""
    numbered = {f"{request.key}#{request.seed}": request for request in requests}
    queue = [GenerationRequest(name, r.messages, r.samples, r.seed) for name, r in numbered.items()]
    for answer in one(queue, temperature=0.7):
        request = numbered[answer.key]
        yield request.key, request.seed + answer.sample, answer


def fuzz(seeds: range, questions: int, slow: bool = True) -> Counter[str]:
    """Problems by kind over all seeds, and the numbers of calls and faults."""
    limits.MAX_WAIT_SECONDS = 0.02
    total: Counter[str] = Counter()
    for seed in seeds:
        for role in (teacher, model):
            with tempfile.TemporaryDirectory() as folder, serving(Quirks.draw(seed, slow)) as server:
                problems = role(server, questions, Path(folder))
                repeated = [key for key, n in server.delivered.items() if n > 1 and key[0] != "Hello."]
                problems["twice"] += len(repeated)
                total += problems
                total["calls"] += server.calls
                total["faults"] += server.calls - server.faults[""]
                if +problems:
                    print(
                        f"seed {seed}, {role.__name__}: {dict(+problems)} {server.quirks.refuses}",
                        repeated[:5],
                    )
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--questions", type=int, default=40)
    arguments = parser.parse_args()
    total = fuzz(range(arguments.first, arguments.first + arguments.seeds), arguments.questions)
    print(", ".join(f"{total[name]} {name}" for name in ("calls", "faults", "lost", "twice", "cost")))
    return int(any(total[name] for name in ("lost", "twice", "cost")))


if __name__ == "__main__":
    sys.exit(main())
