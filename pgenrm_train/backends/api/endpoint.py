"""One model behind an OpenAI-compatible API: limits, retries, a cache and a budget, for teacher and judge.

`Endpoint.complete` is synchronous, and many threads may call it.  They share one limit of calls in flight,
one pace, one budget and one cache on disk.  So a second run pays for nothing twice, and a killed run loses
only the calls in flight.  The cost is on disk with the answers (see `answers`), so that a budget holds over
restarts.  A failed call is a `Reply` with its reason, never an exception and never an empty text.

A server may refuse a field that it does not know (`response_format`, the generator's `n`), a prompt that it
finds too long, or everything.  A comparison shows which: a field is at fault if the same call succeeds
without it, and a prompt if a greeting with the same fields succeeds.  A refused field is left out from then
on, and neither it nor a refused prompt counts towards a server that is down.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.backends.api.answers import OF_THE_ANSWER, PROMPT_REFUSED, Answers, Reply
from pgenrm_train.backends.api.chat_api import ChatApi, Completion, Trouble, may_be_a_field
from pgenrm_train.backends.api.usage import Pace, Usage, dollars
from pgenrm_train.backends.protocols import Spending
from pgenrm_train.config import EndpointConfig
from pgenrm_train.prompts.messages import folded
from pgenrm_train.run.http import key_of

Messages = Sequence[Mapping[str, str]]
Schema = Mapping[str, object]
MAX_WAIT_SECONDS = 60.0  # between two tries of a call, also if the server requests more
RESTED_SECONDS = 30.0  # after which a server that failed call after call is tried again
# Refusals that a prompt may cause, e.g. by its length.
OF_THE_PROMPT = ("http_400", "http_413", "http_422")
# Failures that show a working API; any other may be a login page.
WORKING = (*OF_THE_ANSWER, PROMPT_REFUSED)
REFUSALS = ("closed", "circuit_open", "budget")  # failures of calls that were not made
FORMAT = "response_format"
FIELDS = "leave_out, max_tokens_field, structured and extra_body change the fields of requests"


class Endpoint:
    """A model behind an API, with the limits that all callers share.

    `cache` is a folder for answers; None keeps none.
    """

    def __init__(self, settings: EndpointConfig, cache: Path | None = None) -> None:
        self.settings, self.usage, self.pace = settings, Usage(), Pace(settings)
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self._lock = threading.Lock()
        self._in_a_row, self._open_until = 0, 0.0
        self._refused_fields: set[str] = set()
        self._refused_prompts: dict[str, str] = {}  # key → the server's words
        self._works: bool | None = None  # whether it answers any prompt; None until it is known
        self._greeting = threading.Lock()
        self._cache = Answers(cache) if cache else None
        self.usage.earlier = self._cache.paid() if self._cache else (0, 0)
        self._closed = threading.Event()
        self._key = key_of(settings.api_key_env) if settings.api_key_env else ""
        self._api = ChatApi(settings)

    def complete(self, messages: Messages, *, sample: int = 0, schema: Schema | None = None) -> Reply:
        """Request one completion, with JSON of the shape of `schema`.

        `sample` distinguishes repeated questions and seeds the server.
        """
        body = self.body(messages, sample, schema)
        key = _key(body, sample)
        if self._cache and (known := self._cache.get(key)) is not None:
            with self._lock:
                self.usage.calls += 1
                self.usage.cached += 1
            return replace(known, cached=True)
        with self._slots:
            if (refusal := self.refusal(body)) is not None:
                return refusal
            if (refused := self._refused()) is not None:
                return self.book(Reply(None, refused))
            reply = self._answer(body)
            if self._cache:
                self._cache.add(key, reply)
            return reply

    def knows(self, messages: Messages, *, sample: int = 0) -> bool:
        """Whether the answer is on disk, so that it costs nothing."""
        key = _key(self.body(messages, sample, None), sample)
        return self._cache is not None and self._cache.get(key) is not None

    def close(self) -> None:
        """Stop retries at once; wait for the calls in flight and keep their answers, which are paid for."""
        self._closed.set()
        deadline = time.monotonic() + self.settings.timeout_seconds
        slots = range(self.settings.max_in_flight)
        ended = sum(self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in slots)
        for _ in range(ended):  # calls that still wait for a slot are refused
            self._slots.release()
        self._api.close()
        if self._cache:
            self._cache.close()

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
        return self._refused() == "circuit_open" or 0 < made == self._in_a_row

    @property
    def troubles(self) -> str:
        """The outcome of the last calls, for an error."""
        usage = self.usage
        last = ", ".join(f"{n} × {kind}" for kind, n in usage.failures.most_common(3))
        kind = next((kind for kind, _ in usage.failures.most_common() if usage.words.get(kind)), "")
        whose = "the reason" if kind in ("connection", "timeout", "tls") else "the server's message"
        message = f"; {whose}: {usage.words[kind]}" if kind else ""
        remedy = f"; {FIELDS}" if kind in OF_THE_PROMPT else ""
        calls = "1 call" if self._in_a_row == 1 else f"{self._in_a_row} calls in a row"
        return (
            f"{self.settings.name} at {self.settings.base_url} failed {calls} "
            f"({last}{message}{remedy}); its answers are kept, and the same command continues from there"
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
            dict(usage.words),
        )

    def body(self, messages: Messages, sample: int, schema: Schema | None = None) -> dict[str, object]:
        """The body of a request; fields that the server has refused are not left out yet."""
        settings = self.settings
        body: dict[str, object] = {
            "model": settings.name,
            "messages": folded(messages) if "system" in settings.leave_out else [dict(m) for m in messages],
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
        left_out = {"seed", "temperature"} & set(settings.leave_out)
        return {name: value for name, value in body.items() if name not in left_out} | settings.extra_body

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
        paid = max(self._cache.paid() if self._cache else (0, 0), self.usage.paid, key=sum)
        return (settings.max_dollars is not None and dollars(settings, *paid) >= settings.max_dollars) or (
            settings.max_total_tokens is not None and sum(paid) >= settings.max_total_tokens
        )

    def pay(self, reply: Reply) -> None:
        """Record the cost of an answer that is kept elsewhere."""
        if self._cache:
            self._cache.add(None, reply)

    def book(self, reply: Reply) -> Reply:
        """Count a reply; too many failures in a row open the circuit."""
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            self._count_failure(reply.failure, reply.words)
            if reply.failure in REFUSALS:
                return reply
            working = reply.failure is None or reply.failure in WORKING
            self._works = working or self._works
            self._in_a_row = 0 if working else self._in_a_row + 1
            if self._in_a_row >= self.settings.give_up_after:
                self._open_until = time.monotonic() + RESTED_SECONDS
        return reply

    def count_failures(self, replies: Sequence[tuple[str | None, str]]) -> None:
        """Count (failure, words) of the choices of one answer."""
        with self._lock:
            for failure, words in replies:
                self._count_failure(failure, words)

    def _count_failure(self, failure: str | None, words: str) -> None:
        """Count a failure; the first of its kind is logged in the server's words, without the key."""
        if failure is None:
            return
        first = not self.usage.failures[failure]
        self.usage.failures[failure] += 1
        words = words.replace(self._key, "…") if self._key else words
        if words:
            self.usage.words[failure] = words
        if first and words:
            print(
                f"warning: {self.settings.name} at {self.settings.base_url}: {failure}: {words}",
                file=sys.stderr,
                flush=True,
            )

    def takes(self, name: str) -> bool:
        """Whether the server has not refused a field so far."""
        return name not in self._refused_fields

    def note_refused_field(self, name: str, trouble: Trouble | None = None) -> None:
        """Leave a field out from now on, since a call without it succeeded; its first refusal is counted."""
        with self._lock:
            if name in self._refused_fields:
                return
            self._refused_fields.add(name)
            self._works = True
            if trouble is not None:
                self.usage.calls += 1
                words = f"{trouble.words or 'no reason given'} (requests continue without {name})"
                self._count_failure(trouble.kind, words)

    def refusal(self, body: Mapping[str, object]) -> Reply | None:
        """The refusal of a prompt by this server, in this start or an earlier one; None if there is none."""
        key = _prompt_key(body)
        words = self._refused_prompts.get(key)
        if words is None and self._cache and (words := self._cache.refusal(key)) is not None:
            self._refused_prompts[key] = words
        return None if words is None else Reply(None, PROMPT_REFUSED, words=words)

    def failed(self, body: Mapping[str, object], trouble: Trouble) -> Reply:
        """Book a call without an answer; a prompt that the server refuses is booked once."""
        if trouble.kind not in OF_THE_PROMPT or not self._answers_a_greeting(body):
            return self.book(Reply(None, trouble.kind, words=trouble.words))
        code = trouble.kind.removeprefix("http_")
        reply = Reply(None, PROMPT_REFUSED, words=f"HTTP {code}: {trouble.words}")
        key = _prompt_key(body)
        with self._lock:
            known = key in self._refused_prompts
            self._refused_prompts[key] = reply.words
        if known:
            return reply
        if self._cache:
            self._cache.refuse(key, reply.words)
        return self.book(reply)

    def _answers_a_greeting(self, body: Mapping[str, object]) -> bool:
        """Whether the server answers another prompt with the same fields; paid for at most once."""
        with self._greeting:
            if self._works is not None:
                return self._works
            original: Any = body["messages"]
            messages = [{**message, "content": "Hello."} for message in original]
            greeting = {key: value for key, value in body.items() if key != "n"} | {"messages": messages}
            try:
                reply = _reply(self._tried(greeting))
            except Trouble as trouble:
                if trouble.kind in OF_THE_PROMPT:
                    with self._lock:
                        self._works = self._works or False
                return bool(self._works)
            self.pay(self.book(reply))
            return True

    def _answer(self, body: Mapping[str, object]) -> Reply:
        """Request a completion, without `response_format` if the server refuses it."""
        plain = {key: value for key, value in body.items() if key != FORMAT}
        sent = body if self.takes(FORMAT) else plain
        try:
            return self.book(_reply(self._tried(sent)))
        except Trouble as error:
            trouble = error
        if FORMAT not in sent or not may_be_a_field(trouble.kind):
            return self._unanswered(sent, trouble)
        try:
            reply = _reply(self._tried(plain))
        except Trouble as error:
            return self._unanswered(plain, error)
        self.note_refused_field(FORMAT, trouble)
        return self.book(reply)

    def _unanswered(self, body: Mapping[str, object], trouble: Trouble) -> Reply:
        return self.book(Reply(None, "closed")) if trouble.kind == "closed" else self.failed(body, trouble)

    def _tried(self, body: Mapping[str, object]) -> Completion:
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
            seconds = error.retry_after if isinstance(error, Trouble) else None
            return backoff(state) if seconds is None else min(seconds, MAX_WAIT_SECONDS)

        retrying = Retrying(
            stop=stop_after_attempt(self.settings.attempts) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=pause,
            retry=retry_if_exception(lambda error: isinstance(error, Trouble) and error.passing),
            reraise=True,
        )
        return retrying(self._once, _encoded(body))

    def _once(self, payload: bytes) -> Completion:
        self._closed.wait(self.wait_seconds(len(payload)))
        if self._closed.is_set():
            raise Trouble("closed")
        completion = self._api.post(payload)
        self.pace.learn(completion.prompt_tokens + completion.completion_tokens)
        return completion

    def wait_seconds(self, characters: int, samples: int = 1) -> float:
        """Count a try, and return the seconds until it may start."""
        with self._lock:
            self.usage.tries += 1
        return self.pace.wait_seconds(characters, samples)


def _key(body: Mapping[str, object], sample: int) -> str:
    """Identity of an answer; the sample counts even where its seed is not sent."""
    return hashlib.sha256(_encoded({**body, "seed": sample})).hexdigest()


def _prompt_key(body: Mapping[str, object]) -> str:
    """Identity of a prompt that a server may refuse: without the fields of one sample or of one try."""
    fields = {name: value for name, value in body.items() if name not in ("seed", "n", FORMAT)}
    return hashlib.sha256(_encoded(fields)).hexdigest()


def _encoded(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _reply(completion: Completion) -> Reply:
    """The first choice; a text that was cut off is no answer."""
    choice = completion.choices[0]
    text = choice.text if choice.failure is None else None
    return Reply(
        text, choice.failure, completion.prompt_tokens, completion.completion_tokens, words=choice.words
    )
