"""One model behind an OpenAI-compatible API: limits, retries, a cache and a budget, for teacher and judge.

`Endpoint.complete` is synchronous, and many threads may call it.  They share one limit of calls in flight,
one pace, one budget and one cache on disk.  So a second run pays for nothing twice, and a killed run loses
only the calls in flight.  The cost is on disk with the answers (see `answers`), so that a budget holds over
restarts.  A failed call is a `Reply` with its reason, never an exception and never an empty text.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pgenrm_train.backends.api.answers import Answers, Reply
from pgenrm_train.backends.api.chat_api import NO_COMPLETION, ChatApi, failure_of, is_transient, retry_after
from pgenrm_train.backends.protocols import Spending
from pgenrm_train.config import EndpointConfig

Messages = Sequence[Mapping[str, str]]
Schema = Mapping[str, object]
MAX_WAIT_SECONDS = 60.0  # between two tries of a call, whatever the server asks for
RESTED_SECONDS = 30.0  # after which a server that failed call after call is tried again
# Failures that show no working API; a malformed answer may be a login page.
NO_API = ("timeout", "connection", "http_", "malformed")
OF_THE_PROMPT = ("http_400", "http_413", "http_422")
REFUSALS = ("closed", "circuit_open", "budget")  # failures of calls that were not made
CHARACTERS_PER_TOKEN = 3.0  # a low guess before the first answers


def dollars(settings: EndpointConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """Price at the configured rates, by default 0."""
    return (
        prompt_tokens * settings.dollars_per_million_in + completion_tokens * settings.dollars_per_million_out
    ) / 1e6


@dataclass
class Usage:
    """Calls and tokens of this start; retries count in `tries` only.

    `failures` are by reason, `earlier` the tokens of earlier starts.
    """

    calls: int = 0
    tries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    earlier: tuple[int, int] = (0, 0)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def paid(self) -> tuple[int, int]:
        """Tokens of prompts and of answers in all starts."""
        return self.earlier[0] + self.prompt_tokens, self.earlier[1] + self.completion_tokens


class Endpoint:
    """A model behind an API, with the limits that all callers share.

    `cache` is a folder for answers; None keeps none.
    """

    def __init__(self, settings: EndpointConfig, cache: Path | None = None) -> None:
        self.settings, self.usage = settings, Usage()
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self._lock = threading.Lock()
        self._next_start = 0.0
        # All answers count, cut-off and empty ones too, because the server's limit counts their tokens.
        self._answers = self._tokens = 0
        self._in_a_row, self._open_until, self._refusal = 0, 0.0, ""
        self._known = Answers(cache) if cache else None
        self.usage.earlier = self._known.paid() if self._known else (0, 0)
        self._closed = threading.Event()
        self._api = ChatApi(settings)

    def complete(self, messages: Messages, *, sample: int = 0, schema: Schema | None = None) -> Reply:
        """Request one completion, with JSON of the shape of `schema`.

        `sample` distinguishes repeated questions and seeds the server.
        """
        payload = self._payload(messages, sample, schema)
        key = hashlib.sha256(payload).hexdigest()
        if self._known and (known := self._known.get(key)) is not None:
            with self._lock:
                self.usage.calls += 1
                self.usage.cached += 1
            return replace(known, cached=True)
        with self._slots:
            refused = self._refused()
            reply = self.book(self._tried(payload) if refused is None else Reply(None, refused))
            if self._known:
                self._known.add(key, reply)
            return reply

    def knows(self, messages: Messages, *, sample: int = 0) -> bool:
        """Whether the answer is on disk, so that it costs nothing."""
        key = hashlib.sha256(self._payload(messages, sample, None)).hexdigest()
        return self._known is not None and self._known.get(key) is not None

    def close(self) -> None:
        """Stop retries at once; wait for the calls in flight and keep their answers, which are paid for."""
        self._closed.set()
        deadline = time.monotonic() + self.settings.timeout_seconds
        slots = range(self.settings.max_in_flight)
        ended = sum(self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in slots)
        for _ in range(ended):  # calls that still wait for a slot are refused
            self._slots.release()
        self._api.close()
        if self._known:
            self._known.close()

    @property
    def stopped(self) -> str | None:
        """The reason why further calls are refused; None while the endpoint works."""
        reason = self._refused()
        if reason == "circuit_open":
            return self.troubles
        if reason == "budget":
            return (
                f"the budget of {self.settings.name} is spent: {self.spending().dollars:.2f} dollars and "
                f"{sum(self.usage.paid)} tokens; its answers are kept, and the same command with a "
                "higher limit continues from there"
            )
        return None

    @property
    def down(self) -> bool:
        """Whether the API does not work: the circuit is open, or all calls so far failed to reach it.

        A failure that a prompt causes shows that the API works.
        """
        made = self.usage.calls - self.usage.cached - sum(self.usage.failures[kind] for kind in REFUSALS)
        own_fault = any(self.usage.failures[kind] for kind in OF_THE_PROMPT)
        return self._refused() == "circuit_open" or (0 < made == self._in_a_row and not own_fault)

    @property
    def troubles(self) -> str:
        """The outcome of the last calls, for an error."""
        last = ", ".join(f"{n} × {kind}" for kind, n in self.usage.failures.most_common(3))
        refusal = f"; the server's message: {self._refusal}" if self._refusal else ""
        return (
            f"{self.settings.name} at {self.settings.base_url} failed {self._in_a_row} calls in a row "
            f"({last}{refusal}); its answers are kept, and the same command continues from there"
        )

    def spending(self) -> Spending:
        """The cost report of the endpoint."""
        usage, (prompts, answers) = self.usage, self.usage.paid
        return Spending(
            usage.calls,
            usage.tries,
            usage.cached,
            prompts,
            answers,
            dollars(self.settings, prompts, answers),
            dict(usage.failures.most_common()),
        )

    def _payload(self, messages: Messages, sample: int, schema: Schema | None) -> bytes:
        return json.dumps(self.body(messages, sample, schema), sort_keys=True).encode()

    def body(self, messages: Messages, sample: int, schema: Schema | None = None) -> dict[str, object]:
        """The body of a request."""
        settings = self.settings
        body: dict[str, object] = {
            "model": settings.name,
            "messages": [dict(m) for m in messages],
            "temperature": settings.temperature,
            settings.max_tokens_field: settings.max_tokens,
            "seed": sample,
        }
        if schema is not None and settings.structured == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        elif schema is not None and settings.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _refused(self) -> str | None:
        if self._closed.is_set():
            return "closed"
        if self._spent():
            return "budget"
        return "circuit_open" if time.monotonic() < self._open_until else None

    def _spent(self) -> bool:
        """Whether the cost of all starts, and with a cache of all processes, has reached a limit."""
        settings = self.settings
        if settings.max_dollars is None and settings.max_total_tokens is None:
            return False
        paid = max(self._known.paid() if self._known else (0, 0), self.usage.paid, key=sum)
        return (settings.max_dollars is not None and dollars(settings, *paid) >= settings.max_dollars) or (
            settings.max_total_tokens is not None and sum(paid) >= settings.max_total_tokens
        )

    def note_refusal(self, words: str) -> None:
        """Keep the server's last refusal for errors, without the key, which some servers repeat."""
        key = os.environ.get(self.settings.api_key_env or "")
        self._refusal = words.replace(key, "…") if key else words

    def pay(self, reply: Reply) -> None:
        """Record the cost of an answer that is kept elsewhere."""
        if self._known:
            self._known.add(None, reply)

    def book(self, reply: Reply) -> Reply:
        """Count a reply; too many failures in a row open the circuit."""
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            if reply.failure is not None:
                self.usage.failures[reply.failure] += 1
            if reply.failure in REFUSALS:
                return reply
            unreachable = reply.failure is not None and reply.failure.startswith(NO_API)
            self._in_a_row = self._in_a_row + 1 if unreachable else 0
            if self._in_a_row >= self.settings.give_up_after:
                self._open_until = time.monotonic() + RESTED_SECONDS
        return reply

    def _tried(self, payload: bytes) -> Reply:
        import httpx
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception,
            sleep_using_event,
            stop_after_attempt,
            stop_when_event_set,
            wait_random_exponential,
        )

        backoff = wait_random_exponential(multiplier=1, max=MAX_WAIT_SECONDS)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            seconds = retry_after(error.response.headers if isinstance(error, httpx.HTTPStatusError) else {})
            return backoff(state) if seconds is None else min(seconds, MAX_WAIT_SECONDS)

        retrying = Retrying(
            stop=stop_after_attempt(self.settings.attempts) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=pause,
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            return retrying(self._once, payload)
        except (httpx.HTTPError, *NO_COMPLETION) as error:
            if isinstance(error, httpx.HTTPStatusError):
                self.note_refusal(str(error))
            return Reply(None, failure_of(error))

    def _once(self, payload: bytes) -> Reply:
        self._closed.wait(self.start_in(len(payload)))
        if self._closed.is_set():
            return Reply(None, "closed")
        reply = self._api.post(payload)
        self.learn(reply.prompt_tokens + reply.completion_tokens)
        return reply

    def learn(self, tokens: int) -> None:
        """Record the tokens of one answer, for the pace."""
        with self._lock:
            self._answers, self._tokens = self._answers + 1, self._tokens + tokens

    def start_in(self, characters: int, samples: int = 1) -> float:
        """Count a try and return the seconds until it may start.

        Tries are spread evenly, to at most `requests_per_minute` starts and `tokens_per_minute` tokens.  A
        call is expected to need the mean tokens of the calls so far; the first ones, their maximum.
        """
        settings, gap = self.settings, 0.0
        if settings.requests_per_minute is not None:
            gap = 60.0 / settings.requests_per_minute
        with self._lock:
            self.usage.tries += 1
            if settings.tokens_per_minute is not None:
                most = characters / CHARACTERS_PER_TOKEN + settings.max_tokens * samples
                expected = self._tokens / self._answers if self._answers else most
                gap = max(gap, 60.0 * expected / settings.tokens_per_minute)
            start = max(self._next_start, time.monotonic())
            self._next_start = start + gap
        return max(0.0, start - time.monotonic())
