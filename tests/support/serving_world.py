"""The scoring service over real HTTP, with a stub engine that writes chains by the length of responses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prompt_sections import split_prompt

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import EngineLostError
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.serving.cached_engine import CachedEngine
from pgenrm_train.serving.metrics import Metrics
from pgenrm_train.serving.probabilities import ProbabilityModel
from pgenrm_train.serving.scoring import FindNeighbours, TaskScorer
from pgenrm_train.serving.service import Service
from pgenrm_train.serving.store import UserStore
from recipes.wiring.service.local import http_server

VOTE = {"query": "Plan my trip?", "chosen": "Short.", "rejected": "Much longer."}
QUESTION = {"query": "Fix my report?", "responses": ["Short one.", "A rather long response."]}


def sections(request: GenerationRequest) -> dict[str, str]:
    return dict(split_prompt(request.messages[-1]["content"]))


def by_length(texts: list[str], sample: int = 0) -> str:
    """A chain that prefers short responses, and the first place by one point."""
    marks = [[max(1, 9 - len(text) // 4)] for text in texts]
    marks[0][0] += 1
    return write_chain(f"wants it short, {sample}", [("brevity", 100)], marks)


def shown(request: GenerationRequest) -> list[str]:
    return [text for tag, text in sections(request).items() if tag.startswith("<response_")]


class StubEngine:
    """Answers after `seconds`; `text` makes the chain of a sample, or None for one without an end."""

    def __init__(
        self,
        text: Callable[[GenerationRequest, int], str | None] = lambda r, s: by_length(shown(r), s),
        seconds: float = 0.0,
    ) -> None:
        self.text, self.seconds = text, seconds
        self.requests: list[GenerationRequest] = []
        self.failure: EngineLostError | None = None
        self.cancelled = 0

    async def generate(self, request: GenerationRequest, temperature: float) -> list[Generation]:
        self.requests.append(request)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure:
            raise self.failure
        texts = [self.text(request, sample) for sample in range(request.samples)]
        return [
            Generation("", s, text, None if text else "length", 7 if text else 1)
            for s, text in enumerate(texts)
        ]

    def lost(self) -> EngineLostError | None:
        return self.failure


def configured(folder: Path, **settings: Any) -> Config:
    config = Config(recipe="serve")
    config.serve.store = f"sqlite:///{folder}/users.db"
    for name, value in settings.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section), key, value)
    return config


def service_of(
    config: Config,
    engine: StubEngine,
    find: FindNeighbours | None = None,
    calibration: ProbabilityModel | None = None,
) -> Service:
    store = UserStore(config.serve.store)
    cached = CachedEngine(engine, store, "stub")
    scorer = TaskScorer(config, cached, chat_messages, find)
    return Service(config, scorer, store, Metrics(), calibration)


@contextlib.contextmanager
def running(service: Service, key: str | None = None) -> Iterator[httpx.Client]:
    """A client of the service on a free port."""
    server, listening = http_server(service, key), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = listening.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        service.store.close()
