"""Generate for many prompts at once, with a cache of answers about stored users.

Sampling is seeded by the prompt, so a repeated request has the same answers with or without the cache.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.errors import EngineLostError
from pgenrm_train.files import fingerprint
from pgenrm_train.serving.store import UserStore

Samples = Sequence[Generation]


class Engine(Protocol):
    """A model that answers any number of requests at the same time."""

    async def generate(self, request: GenerationRequest, temperature: float) -> Samples:
        """The samples of a request, in order.  Raises EngineLostError."""

    def lost(self) -> EngineLostError | None:
        """The reason why the engine is lost; None while it works."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request, and the stored users whose votes it shows; uncached without any."""

    request: GenerationRequest
    owners: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answered:
    samples: Samples
    cached: bool = False


class CachedEngine:
    """An engine with a cache in the store; `identity` names the model and its sampling."""

    def __init__(self, engine: Engine, store: UserStore, identity: str) -> None:
        self._engine, self.store, self._identity = engine, store, identity

    def lost(self) -> EngineLostError | None:
        """The reason why the engine is lost; None while it works."""
        return self._engine.lost()

    async def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[Answered]:
        """Answer prompts, in order; new answers about stored users are cached.

        Raises EngineLostError.
        """
        keys = [self._key(prompt, temperature) for prompt in prompts]
        cacheable = [key for key, prompt in zip(keys, prompts) if prompt.owners]
        cached = await asyncio.to_thread(self.store.answers, cacheable) if cacheable else {}
        new = [prompt for key, prompt in zip(keys, prompts) if key not in cached]
        generated = iter(await self._generate([prompt.request for prompt in new], temperature))
        answers = [
            Answered(_read(cached[key]), cached=True) if key in cached else Answered(next(generated))
            for key in keys
        ]
        fresh = {
            key: (_write(answer.samples), prompt.owners)
            for key, prompt, answer in zip(keys, prompts, answers)
            if prompt.owners and not answer.cached and not _engine_failed(answer.samples)
        }
        if fresh:
            await asyncio.to_thread(self.store.keep, fresh)
        return answers

    async def _generate(self, requests: Sequence[GenerationRequest], temperature: float) -> list[Samples]:
        tasks = [asyncio.ensure_future(self._engine.generate(request, temperature)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # After an error or a time-out the other requests leave the engine.
            for task in tasks:
                task.cancel()

    def _key(self, prompt: Prompt, temperature: float) -> str:
        request = prompt.request
        parts = (sorted(prompt.owners), request.messages, request.samples, request.seed, temperature)
        return fingerprint(self._identity, *parts)


def _engine_failed(samples: Samples) -> bool:
    return any((sample.failure or "").startswith("engine:") for sample in samples)


def _write(samples: Samples) -> str:
    return json.dumps([asdict(sample) for sample in samples])


def _read(value: str) -> Samples:
    return [Generation(**sample) for sample in json.loads(value)]
