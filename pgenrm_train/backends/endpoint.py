"""One model behind an OpenAI-compatible API, for teacher and judge: bounded, retried, cached, paid for, and honest about failure.

`Endpoint.ask` is synchronous and may be called from many threads; all of them share one limit of calls in flight, one pace, one
budget and one cache on disk, so that a second run pays for nothing twice and a killed one loses only what was in flight.
An answer that could not be had is a `Reply` with its reason, never an exception and never an empty text.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import ConfigError

Messages = Sequence[Mapping[str, str]]
MAX_WAIT_SECONDS = 60.0  # between two tries of a call, whatever the server asks for
RESTED_SECONDS = 30.0  # after which a server that failed call after call is tried again
CHARACTERS_PER_TOKEN = 3.0  # a low guess, until answers tell


@dataclass(frozen=True, slots=True)
class Reply:
    """`text`, or None and why: timeout · connection · http_<code> · length · empty · malformed · circuit_open · budget."""

    text: str | None
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


@dataclass
class Usage:
    """What was asked and paid since the start; `failures` by reason.  Retries count in `tries` only."""

    calls: int = 0
    tries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def dollars(self, settings: EndpointConfig) -> float:
        paid = self.prompt_tokens * settings.dollars_per_million_in + self.completion_tokens * settings.dollars_per_million_out
        return paid / 1e6

    def facts(self, settings: EndpointConfig) -> dict[str, Any]:
        """For manifests."""
        return {
            "calls": self.calls, "tries": self.tries, "from cache": self.cached, "prompt tokens": self.prompt_tokens,
            "completion tokens": self.completion_tokens, "dollars": round(self.dollars(settings), 4),
            "failures": dict(self.failures.most_common()),
        }  # fmt: skip


class Endpoint:
    """See the module's docstring.  `cache`: a folder for answers; None keeps none."""

    def __init__(self, settings: EndpointConfig, cache: Path | None = None) -> None:
        self.settings, self.usage = settings, Usage()
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self._lock = threading.Lock()
        self._next_start = 0.0
        self._answers, self._tokens = 0, 0  # that came back, cut-off and empty ones too: what a call costs the server's limit
        self._in_a_row, self._open_until = 0, 0.0
        self._cache = _open_cache(cache)
        self._closed = threading.Event()
        self._client = _client(settings)

    def ask(self, messages: Messages, *, sample: int = 0, schema: Mapping[str, Any] | None = None) -> Reply:
        """One completion.  `sample` tells repeated questions apart and seeds the server; `schema` asks for JSON of that shape."""
        body = self._body(messages, sample, schema)
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if (known := self._cache.get(key)) is not None:
            with self._lock:
                self.usage.calls += 1
                self.usage.cached += 1
            return Reply(known["text"], None, known["in"], known["out"], cached=True)
        if (refused := self._refused()) is not None:
            return self._counted(Reply(None, refused))
        with self._slots:
            reply = self._counted(self._tried(body))
        if reply.text is not None:
            self._cache.set(key, {"text": reply.text, "in": reply.prompt_tokens, "out": reply.completion_tokens})
        return reply

    def close(self) -> None:
        """Waiting retries give up at once."""
        self._closed.set()
        self._client.close()
        self._cache.close()

    @property
    def stopped(self) -> str | None:
        """Why every further call is refused, in words; None while the endpoint works."""
        reason = self._refused()
        if reason == "budget":
            return (
                f"the budget of {self.settings.name} is spent: {self.usage.dollars(self.settings):.2f} dollars and "
                f"{self.usage.prompt_tokens + self.usage.completion_tokens} tokens"
            )
        if reason == "circuit_open":
            last = ", ".join(f"{n} × {kind}" for kind, n in self.usage.failures.most_common(3))
            return f"{self.settings.name} at {self.settings.base_url} failed {self._in_a_row} calls in a row ({last})"
        return None

    def _body(self, messages: Messages, sample: int, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.name, "messages": [dict(m) for m in messages], "temperature": settings.temperature,
            settings.max_tokens_field: settings.max_tokens, "seed": sample,
        }  # fmt: skip
        if schema is not None and settings.structured == "json_schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        elif schema is not None and settings.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _refused(self) -> str | None:
        settings = self.settings
        tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if settings.max_dollars is not None and self.usage.dollars(settings) >= settings.max_dollars:
            return "budget"
        if settings.max_total_tokens is not None and tokens >= settings.max_total_tokens:
            return "budget"
        return "circuit_open" if time.monotonic() < self._open_until else None

    def _counted(self, reply: Reply) -> Reply:
        """Book the reply; too many failures in a row open the circuit."""
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            if reply.failure is not None:
                self.usage.failures[reply.failure] += 1
            if reply.failure in ("circuit_open", "budget"):
                return reply
            unreachable = reply.failure is not None and reply.failure.startswith(("timeout", "connection", "http_"))
            self._in_a_row = self._in_a_row + 1 if unreachable else 0
            if self._in_a_row >= self.settings.give_up_after:
                self._open_until = time.monotonic() + RESTED_SECONDS
        return reply

    def _tried(self, body: dict[str, Any]) -> Reply:
        import openai
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
            asked = _retry_after(state.outcome.exception() if state.outcome else None)
            return backoff(state) if asked is None else min(asked, MAX_WAIT_SECONDS)

        retrying = Retrying(
            stop=stop_after_attempt(self.settings.attempts) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=pause,
            retry=retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            return retrying(self._once, body)
        except openai.APITimeoutError:
            return Reply(None, "timeout")
        except openai.APIStatusError as error:
            return Reply(None, f"http_{error.status_code}")
        except openai.APIConnectionError:
            return Reply(None, "connection")
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):  # an answer that is no chat completion
            return Reply(None, "malformed")

    def _once(self, body: dict[str, Any]) -> Reply:
        self._keep_pace(body)
        with self._lock:
            self.usage.tries += 1
        answer = self._client.chat.completions.create(**body)
        choice, used = answer.choices[0], answer.usage
        spent = (used.prompt_tokens, used.completion_tokens) if used else (0, 0)
        with self._lock:
            self._answers, self._tokens = self._answers + 1, self._tokens + sum(spent)
        if choice.finish_reason == "length":
            return Reply(None, "length", *spent)
        text = choice.message.content
        return Reply(text, None, *spent) if text and text.strip() else Reply(None, "empty", *spent)

    def _keep_pace(self, body: Mapping[str, Any]) -> None:
        """At most `requests_per_minute` starts and `tokens_per_minute` tokens, evenly spread.

        A call is taken to need as many tokens as calls have needed so far; the first ones, as many as they may.
        """
        settings, gap = self.settings, 0.0
        if settings.requests_per_minute is not None:
            gap = 60.0 / settings.requests_per_minute
        with self._lock:
            if settings.tokens_per_minute is not None:
                most = len(json.dumps(body["messages"])) / CHARACTERS_PER_TOKEN + settings.max_tokens
                expected = self._tokens / self._answers if self._answers else most
                gap = max(gap, 60.0 * expected / settings.tokens_per_minute)
            start = max(self._next_start, time.monotonic())
            self._next_start = start + gap
        self._closed.wait(max(0.0, start - time.monotonic()))


def _client(settings: EndpointConfig) -> Any:
    import openai

    if not settings.base_url or not settings.name:
        raise ConfigError("an endpoint needs base_url (e.g. http://localhost:8000/v1) and name (the served model)")
    key = "none" if settings.api_key_env is None else os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(f"the environment variable {settings.api_key_env} named by api_key_env is not set")
    return openai.OpenAI(base_url=settings.base_url, api_key=key, max_retries=0, timeout=settings.timeout_seconds)


class _NoCache:
    def get(self, key: str) -> None:
        return None

    def set(self, key: str, value: Any) -> None: ...

    def close(self) -> None: ...


def _open_cache(folder: Path | None) -> Any:
    if folder is None:
        return _NoCache()
    import diskcache

    # JSON on disk (the default disk pickles) and no eviction: an answer was paid for
    return diskcache.Cache(str(folder), disk=diskcache.JSONDisk, eviction_policy="none")


def _is_transient(error: BaseException) -> bool:
    """Worth another try: no connection, too slow, too many requests, the server's own fault."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asked us to wait."""
    response = getattr(error, "response", None)
    try:
        return float(response.headers["retry-after"]) if response is not None else None
    except (KeyError, ValueError):
        return None
