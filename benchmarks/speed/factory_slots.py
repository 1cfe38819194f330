"""Busy share of a server under `recipe=build_sec`, and the client's CPU time per request.

    python benchmarks/speed/factory_slots.py [--seconds 2] [--slots 64] [--rounds 10]

A stub server in a process of its own answers every request with a chain after two seconds.  Busy share:
the mean number of requests in the server, over its slots, from the first arrival to the last.  The
factory's path is the real one (prompts, queue, cache on disk, parsing, rejection).  The baseline of the
same run is a thread pool around the openai client that discards the answers.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.roles import LlmTeacher
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.stages.build_sec import sample_chains

WORDS = [
    "the",
    "answer",
    "names",
    "what",
    "this",
    "user",
    "asked",
    "for",
    "and",
    "says",
    "in",
    "plain",
    "words",
    "why",
    "it",
    "holds",
]


class Stub:
    """Server that holds each request for `seconds`, and integrates the number of held requests."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.busy, self.area, self.requests = seconds, 0, 0.0, 0
        self.first = self.last = self.changed = 0.0
        self.area_at_last = 0.0

    def change(self, by: int) -> None:
        now = time.monotonic()
        self.area += self.busy * (now - self.changed) if self.changed else 0.0
        self.busy, self.changed = self.busy + by, now
        if by > 0:
            self.first, self.last, self.area_at_last = self.first or now, now, self.area
            self.requests += 1

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                head = await reader.readuntil(b"\r\n\r\n")
                if line.startswith(b"GET"):
                    mean = self.area_at_last / max(self.last - self.first, 1e-9)
                    await self.send(writer, {"busy": mean, "requests": self.requests})
                    self.__init__(self.seconds)  # type: ignore[misc]
                    continue
                length = next(
                    int(h.split(b":")[1])
                    for h in head.split(b"\r\n")
                    if h.lower().startswith(b"content-length")
                )
                await reader.readexactly(length)
                self.change(+1)
                await asyncio.sleep(self.seconds)
                self.change(-1)
                await self.send(writer, answer(self.requests))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def send(self, writer: asyncio.StreamWriter, what: object) -> None:
        body = json.dumps(what).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        await writer.drain()


def answer(number: int) -> dict[str, object]:
    """A completion of about 2 kB that parses."""
    analysis = " ".join(WORDS[(i * (number + 1)) % len(WORDS)] for i in range(300))
    text = write_chain(f"{number}: {analysis}", [("plain words", 60), ("focus", 40)], [[9, 8], [3, 4]])
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 900, "completion_tokens": 500, "total_tokens": 1400},
    }


async def serve(seconds: float) -> None:
    server = await asyncio.start_server(Stub(seconds).serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def pairs(count: int) -> list[PreferencePair]:
    def text(number: int, words: int) -> str:
        return " ".join(WORDS[(i * number) % len(WORDS)] for i in range(words))

    return [
        PreferencePair(
            f"p{n}",
            f"u{n % 50}",
            (Message("user", f"{n}: {text(n, 20)}"),),
            text(n + 1, 150),
            text(n + 2, 150),
        )
        for n in range(count)
    ]


def factory(settings: EndpointConfig, votes: Sequence[PreferencePair], folder: Path) -> None:
    endpoint = Endpoint(settings, folder / "cache")
    config = Config()
    config.sec.samples_per_pair = 1
    sample_chains(config, votes, LlmTeacher(endpoint), lambda items, _what, _total: items)
    endpoint.close()


def naive(settings: EndpointConfig, votes: Sequence[PreferencePair], _folder: Path) -> None:
    import openai

    client = openai.OpenAI(base_url=settings.base_url, api_key="none", max_retries=0)

    def ask(vote: PreferencePair) -> None:
        content = f"{vote.query}\n{vote.chosen}\n{vote.rejected}" * 5
        client.chat.completions.create(model="stub", messages=[{"role": "user", "content": content}])

    with ThreadPoolExecutor(settings.max_in_flight) as pool:
        list(pool.map(ask, votes))
    client.close()


def measured(
    run: Callable[..., None], settings: EndpointConfig, votes: Sequence[PreferencePair], folder: Path
) -> tuple[float, float]:
    """Busy slots, and CPU seconds per request."""
    began = time.process_time()
    run(settings, votes, folder)
    cpu = time.process_time() - began
    with urllib.request.urlopen(f"{settings.base_url}/stats") as response:
        stats = json.load(response)
    return stats["busy"], cpu / stats["requests"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("seconds", 2.0), ("slots", 64), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.seconds))
    else:
        compare(given.slots, given.rounds, given.seconds)


def compare(slots: int, rounds: int, seconds: float) -> None:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", "--seconds", str(seconds)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        settings = EndpointConfig(
            kind="endpoint", base_url=url, name="stub", max_in_flight=slots, timeout_seconds=60.0
        )
        votes = pairs(slots * rounds)
        with tempfile.TemporaryDirectory() as folder:
            factory(settings, votes[:2], Path(folder) / "warm")  # imports
            measured(naive, settings, votes[:2], Path(folder))
            ours = measured(factory, settings, votes, Path(folder))
            theirs = measured(naive, settings, votes, Path(folder))
    finally:
        server.terminate()
    for name, (busy, cpu) in (("build_sec", ours), ("thread pool", theirs)):
        print(f"{name}: {busy / slots:.1%} of {slots} slots busy, {cpu * 1000:.1f} ms CPU per request")
    print(f"CPU per request: {ours[1] / theirs[1]:.2f} × the thread pool's")


if __name__ == "__main__":
    main()
