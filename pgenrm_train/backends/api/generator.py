"""A model under test behind an API: one asynchronous queue over all requests (METHOD §7).

A request for m samples is *one* call with `n` = m, so that the server encodes the prompt once.  A server
without `n` gets m calls.  At most `max_in_flight` samples are in flight, and the queue takes a request only
when it has room.  The event loop runs only while the caller waits for the next answer, so a caller that
stores answers slowly slows down the queue and does not fill the memory.  Pace, budget and circuit are the
`Endpoint`'s.

A failed sample is a failed generation, `engine:<kind>`.  If the server is down or the budget spent, the queue
yields the samples in flight and then raises BackendError.
"""

import asyncio
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.answers import Reply
from pgenrm_train.backends.api.chat_api import (
    NO_COMPLETION,
    is_transient_status,
    refusal,
    replace_surrogates,
    retry_after,
    tokens_of,
    url_and_headers,
)
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Spending
from pgenrm_train.errors import BackendError

REFUSES_N = ("engine:http_400", "engine:http_422")  # how servers answer an unknown field
ENGINE = "engine:"


class EndpointGenerator:
    """A generator on one endpoint; sample s of a request has the seed `seed` + s, as in vLLM's server."""

    def __init__(self, endpoint: Endpoint, stop: str | None = None) -> None:
        """`stop`: text before which the server ends an answer."""
        self.endpoint, self.stop = endpoint, stop

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        if temperature != self.endpoint.settings.temperature:
            raise ValueError(
                f"the endpoint samples at temperature {self.endpoint.settings.temperature}, not {temperature}"
            )
        queue = _Queue(self.endpoint, requests, self.stop)
        with asyncio.Runner() as runner:
            try:
                while answers := runner.run(queue.next()):
                    yield from answers
            finally:
                runner.run(queue.close())

    def spending(self) -> Spending:
        return self.endpoint.spending()

    def close(self) -> None:
        self.endpoint.close()


class _Trouble(Exception):
    """A try without an answer."""

    def __init__(self, kind: str, *, passing: bool = True, retry_after: float | None = None) -> None:
        self.kind, self.passing, self.retry_after = kind, passing, retry_after


class _Queue:
    def __init__(
        self, endpoint: Endpoint, requests: Iterable[GenerationRequest], stop: str | None = None
    ) -> None:
        self.endpoint, self.waiting, self.stop = endpoint, iter(requests), stop
        self.url, self.headers = url_and_headers(endpoint.settings)
        self.exhausted = False
        self.several = True  # until the server refuses n
        self.samples = 0  # in flight
        self.tasks: set[asyncio.Task[None]] = set()
        self.answered: asyncio.Queue[list[Generation] | BaseException] = asyncio.Queue()
        self.session: Any = None

    async def next(self) -> list[Generation]:
        """Answers since the last call, at least those of one request; an empty list at the end."""
        stopped = self.endpoint.stopped
        if stopped is None:
            self._fill()
        elif not self.samples and not self.exhausted:
            raise BackendError(f"model: {stopped}")
        if not self.samples:
            if self.endpoint.down:  # a small queue is in flight at once, before the circuit opens
                raise BackendError(f"model: {self.endpoint.troubles}")
            return []
        generations = self._taken(await self.answered.get())
        while not self.answered.empty():
            generations += self._taken(self.answered.get_nowait())
        return generations

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.session is not None:
            await self.session.close()

    def _fill(self) -> None:
        while not self.exhausted and self.samples < self.endpoint.settings.max_in_flight:
            request = next(self.waiting, None)
            if request is None:
                self.exhausted = True
                return
            self.samples += request.samples
            task = asyncio.get_running_loop().create_task(self._answer(request))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _taken(self, answer: list[Generation] | BaseException) -> list[Generation]:
        if isinstance(answer, BaseException):
            raise answer
        self.samples -= len(answer)
        return answer

    async def _answer(self, request: GenerationRequest) -> None:
        try:
            self.answered.put_nowait(await self._sampled(request))
        except Exception as error:  # a bug of ours; the caller must not wait for ever
            self.answered.put_nowait(error)

    async def _sampled(self, request: GenerationRequest) -> list[Generation]:
        if not self.several or request.samples == 1:
            return await self._singly(request, 0)
        first = await self._call(request, 0, request.samples)
        if len(first) == request.samples and first[0].failure not in REFUSES_N:
            return first
        if first[0].failure in REFUSES_N:
            first = []  # of n or of the prompt: single calls will show which
        rest = await self._singly(request, len(first))
        self.several = self.several and any(generation.failure in REFUSES_N for generation in rest)
        return first + rest

    async def _singly(self, request: GenerationRequest, first: int) -> list[Generation]:
        calls = [self._call(request, sample, 1) for sample in range(first, request.samples)]
        return [generation for answer in await asyncio.gather(*calls) for generation in answer]

    async def _call(self, request: GenerationRequest, first: int, samples: int) -> list[Generation]:
        """`samples` generations from number `first`; at least one, but no more than the server gives."""
        body = self.endpoint.body(request.messages, (request.seed + first) % 2**31)
        if samples > 1:
            body["n"] = samples
        if self.stop is not None:
            body["stop"] = [self.stop]
        try:
            answer = await self._tried(body, samples)
            choices = [_read(choice) for choice in answer["choices"][:samples]]
            spent = tokens_of(answer)
            if not choices:
                raise ValueError
        except _Trouble as trouble:
            return self._failed(request, first, samples, trouble.kind)
        except NO_COMPLETION:
            return self._failed(request, first, samples, "malformed")
        self.endpoint.learn(sum(spent))
        self.endpoint.pay(self.endpoint.book(Reply("", None, *spent)))
        self.endpoint.usage.failures.update(f.removeprefix(ENGINE) for _, f in choices if f)
        return [
            Generation(request.key, first + i, text, failure, spent[1] // len(choices))
            for i, (text, failure) in enumerate(choices)
        ]

    def _failed(self, request: GenerationRequest, first: int, samples: int, kind: str) -> list[Generation]:
        self.endpoint.book(Reply(None, kind))
        return [Generation(request.key, first + i, None, f"{ENGINE}{kind}") for i in range(samples)]

    async def _tried(self, body: dict[str, object], samples: int) -> Any:
        """Try as `Endpoint` does: exponential backoff with jitter, or the wait that the server requests."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._once(body, samples)
            except _Trouble as trouble:
                if not trouble.passing or attempt >= self.endpoint.settings.attempts:
                    raise
                wait = random.uniform(0, 2.0**attempt) if trouble.retry_after is None else trouble.retry_after
            await asyncio.sleep(min(wait, limits.MAX_WAIT_SECONDS))

    async def _once(self, body: dict[str, object], samples: int) -> Any:
        import aiohttp

        settings = self.endpoint.settings
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # `max_in_flight` is the limit
                timeout=aiohttp.ClientTimeout(total=settings.timeout_seconds),
                headers=self.headers,
                trust_env=True,  # proxies, as other clients do
            )
        payload = json.dumps(body).encode()
        await asyncio.sleep(self.endpoint.start_in(len(payload), samples))
        try:
            async with self.session.post(self.url, data=payload) as response:
                content = await response.read()
        except TimeoutError:
            raise _Trouble("timeout") from None
        except aiohttp.ClientError:
            raise _Trouble("connection") from None
        if response.status >= 400:
            self.endpoint.note_refusal(refusal(content))
            raise _Trouble(
                f"http_{response.status}",
                passing=is_transient_status(response.status),
                retry_after=retry_after(response.headers),
            )
        return json.loads(content)


def _read(choice: Any) -> tuple[str | None, str | None]:
    """(text, failure) of one choice."""
    text = replace_surrogates(choice["message"]["content"])
    if choice.get("finish_reason") == "length":
        return text, "length"
    return (text, None) if isinstance(text, str) and text.strip() else (None, f"{ENGINE}empty")
