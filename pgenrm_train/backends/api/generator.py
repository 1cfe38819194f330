"""A model under test behind an API: one asynchronous queue over all requests (METHOD §7).

A request for m samples is *one* call with `n` = m, so that the server encodes the prompt once.  A server
that refuses or ignores `n` gets m calls, from then on at once.  At most `max_in_flight` samples are in
flight, and the queue takes a request only when it has room.  The event loop runs only while the caller waits
for the next answer, so a caller that stores answers slowly slows down the queue and does not fill the memory.
Pace, budget and circuit are the `Endpoint`'s.

A failed sample is a failed generation: `engine:<kind>`, which another start requests again, or one
of `FINAL`, which would cost the same and fail again.  If the server is down or the budget spent, the queue
yields the samples in flight and then raises BackendError.
"""

import asyncio
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.answers import OF_THE_ANSWER, PROMPT_REFUSED, Reply
from pgenrm_train.backends.api.chat_api import (
    MOVES,
    Choice,
    Completion,
    Trouble,
    may_be_a_field,
    moved_to,
    read_answer,
    url_and_headers,
)
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Spending
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.run.http import lost_connection, proxy_for, trusted

ENGINE = "engine:"
HEADER_BYTES = 2**16  # of the longest line of an answer's header
FINAL = (*OF_THE_ANSWER, PROMPT_REFUSED)  # failures that were paid for, or that would repeat


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


class _Queue:
    def __init__(
        self, endpoint: Endpoint, requests: Iterable[GenerationRequest], stop: str | None = None
    ) -> None:
        self.endpoint, self.waiting, self.stop = endpoint, iter(requests), stop
        self.url, self.headers = url_and_headers(endpoint.settings)
        self.proxy = proxy_for(self.url)
        if self.proxy and self.proxy.startswith("socks"):
            raise ConfigError(
                "the model under test cannot be called through a SOCKS proxy; use an http:// one, or NO_PROXY"
            )
        self.exhausted = False
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
        if not self.endpoint.takes("n") or request.samples == 1:
            return await self._singly(request, 0)
        body = self._body(request, 0, request.samples)
        if (refusal := self.endpoint.refusal(body)) is not None:
            return self._failed(request, 0, request.samples, refusal)
        try:
            completion = await self._tried(body, request.samples)
        except Trouble as trouble:
            if may_be_a_field(trouble.kind):
                return await self._without_n(request, trouble)
            return self._failed(request, 0, request.samples, await self._booked(body, trouble))
        first = self._answered(request, 0, request.samples, completion)
        if len(first) == request.samples:
            return first
        self.endpoint.note_refused_field("n")
        return first + await self._singly(request, len(first))

    async def _without_n(self, request: GenerationRequest, trouble: Trouble) -> list[Generation]:
        """A single call shows whether the refusal was one of `n`; if not, all samples fail in this way."""
        [first] = await self._call(request, 0)
        if first.failure in (PROMPT_REFUSED, f"{ENGINE}{trouble.kind}"):
            return [replace(first, sample=sample) for sample in range(request.samples)]
        if first.failure is None:
            self.endpoint.note_refused_field("n", trouble)
        return [first, *await self._singly(request, 1)]

    async def _singly(self, request: GenerationRequest, first: int) -> list[Generation]:
        calls = [self._call(request, sample) for sample in range(first, request.samples)]
        return [generation for answer in await asyncio.gather(*calls) for generation in answer]

    async def _call(self, request: GenerationRequest, sample: int) -> list[Generation]:
        body = self._body(request, sample, 1)
        if (refusal := self.endpoint.refusal(body)) is not None:
            return self._failed(request, sample, 1, refusal)
        try:
            return self._answered(request, sample, 1, await self._tried(body, 1))
        except Trouble as trouble:
            return self._failed(request, sample, 1, await self._booked(body, trouble))

    def _body(self, request: GenerationRequest, first: int, samples: int) -> dict[str, object]:
        body = self.endpoint.body(request.messages, (request.seed + first) % 2**31)
        stop = {} if self.stop is None else {"stop": [self.stop]}
        return body | stop | ({"n": samples} if samples > 1 else {})

    async def _booked(self, body: dict[str, object], trouble: Trouble) -> Reply:
        """In a thread, since the endpoint may call the server once more to find out what is at fault."""
        return await asyncio.to_thread(self.endpoint.failed, body, trouble)

    def _answered(
        self, request: GenerationRequest, first: int, samples: int, completion: Completion
    ) -> list[Generation]:
        """At most `samples` generations from number `first` on, and at least one."""
        choices = completion.choices[:samples]
        spent = completion.prompt_tokens, completion.completion_tokens
        self.endpoint.pace.learn(sum(spent))
        self.endpoint.pay(self.endpoint.book(Reply("", None, *spent)))
        self.endpoint.count_failures([(choice.failure, choice.words) for choice in choices])
        return [
            self._generation(request, first + i, choice, spent[1] // len(choices))
            for i, choice in enumerate(choices)
        ]

    def _generation(self, request: GenerationRequest, sample: int, choice: Choice, tokens: int) -> Generation:
        failure = choice.failure if choice.failure in (None, *FINAL) else f"{ENGINE}{choice.failure}"
        return Generation(request.key, sample, choice.text, failure, tokens, choice.words)

    def _failed(self, request: GenerationRequest, first: int, samples: int, reply: Reply) -> list[Generation]:
        choice = Choice(None, reply.failure, reply.words)
        return [self._generation(request, first + i, choice, 0) for i in range(samples)]

    async def _tried(self, body: dict[str, object], samples: int) -> Completion:
        """Try as `Endpoint` does: exponential backoff with jitter, or the wait that the server requests."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._once(body, samples)
            except Trouble as trouble:
                if not trouble.passing or attempt >= self.endpoint.settings.attempts:
                    raise
                if samples > 1 and not self.endpoint.takes("n"):
                    raise
                wait = random.uniform(0, 2.0**attempt) if trouble.retry_after is None else trouble.retry_after
            await asyncio.sleep(min(wait, limits.MAX_WAIT_SECONDS))

    async def _once(self, body: dict[str, object], samples: int) -> Completion:
        import aiohttp

        settings = self.endpoint.settings
        if self.session is None:
            self.session = aiohttp.ClientSession(
                # `max_in_flight` is the limit.
                connector=aiohttp.TCPConnector(limit=0, ssl=trusted()),
                timeout=aiohttp.ClientTimeout(total=settings.timeout_seconds),
                headers=self.headers,
                # As httpx allows; gateways send policies of more than aiohttp's 8 KiB.
                max_field_size=HEADER_BYTES,
                max_line_size=HEADER_BYTES,
            )
        payload = json.dumps(body).encode()
        await asyncio.sleep(self.endpoint.wait_seconds(len(payload), samples))
        try:
            for _ in range(MOVES):
                post = self.session.post(self.url, data=payload, proxy=self.proxy, allow_redirects=False)
                async with post as response:
                    content = await response.read()
                if (moved := moved_to(self.url, response.status, response.headers)) is None:
                    break
                self.url = moved
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            kind, words, passing = lost_connection(error, self.proxy)
            raise Trouble(kind, words, passing=passing) from None
        return read_answer(response.status, response.headers, content)
