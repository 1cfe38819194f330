"""Teacher, judge and model under test that are language models behind an `Endpoint`."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.backends.base import Generation, GenerationRequest
from pgenrm_train.backends.endpoint import Endpoint
from pgenrm_train.concurrency import concurrently
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.judging import SCHEMA, judge_messages, read_verdict
from pgenrm_train.masking import FullView
from pgenrm_train.prompts import chat_messages
from pgenrm_train.records import Example


class LlmTeacher:
    """Writes chains from history and explicit signals, as METHOD §3 asks; see `base.Teacher`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.in_flight = endpoint, endpoint.settings.max_in_flight

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        if stopped := self.endpoint.stopped:
            raise BackendError(f"teacher: {stopped}; what was answered is kept, and the same command goes on from there")
        view = FullView(example.context, example.history, example.responses, example.explicit)
        messages = chat_messages(view, instructions=self.endpoint.settings.instructions)
        if complaint is not None:
            again = f"Your last answer could not be used ({complaint}). Write it anew, in exactly the format asked for."
            messages.append({"role": "user", "content": again})
        reply = self.endpoint.ask(messages, sample=attempt)
        return Generation(example.pair_id, attempt, reply.text, reply.failure, reply.completion_tokens)

    def facts(self) -> Mapping[str, Any]:
        return self.endpoint.usage.facts(self.endpoint.settings)


class LlmJudge:
    """Rates chains against the withheld signals; see `base.Judge`.  Every failure is None and counted by kind.

    One chain in `AUDIT_EVERY` is judged twice, and the absolute difference of the two scores is kept.
    """

    AUDIT_EVERY = 50

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.lock, self.asked = threading.Lock(), 0
        self.failures: Counter[str] = Counter()
        self.differences: list[float] = []

    def __call__(self, chain_text: str, example: Mapping[str, Any]) -> float | None:
        said = json.loads(example["explicit"])
        with self.lock:
            self.asked += 1
            audited = self.asked % self.AUDIT_EVERY == 0
        score = self._score(chain_text, said, 0)
        if audited and score is not None and (again := self._score(chain_text, said, 1)) is not None:
            with self.lock:
                self.differences.append(abs(score - again))
        return score

    def metrics(self) -> dict[str, float]:
        """Sums since the start, for the metrics of a step; `no_verdict/<kind>` are chains whose process reward is null."""
        usage = self.endpoint.usage
        return {
            "calls": usage.calls, "tries": usage.tries, "from_cache": usage.cached, "dollars": usage.dollars(self.endpoint.settings),
            "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "judged_twice": len(self.differences), "judged_twice_difference": sum(self.differences),
            **{f"no_verdict/{kind}": count for kind, count in self.failures.items()},
        }  # fmt: skip

    def _score(self, chain_text: str, said: Mapping[str, Any], sample: int) -> float | None:
        reply = self.endpoint.ask(judge_messages(chain_text, said), sample=sample, schema=SCHEMA)
        verdict = read_verdict(reply.text) if reply.text is not None else None
        if verdict is None:
            with self.lock:
                self.failures[reply.failure or "unreadable"] += 1
            return None
        return verdict.score


class EndpointGenerator:
    """A model under test behind an API; see `base.Generator`.  Samples are calls of their own, all in one queue.

    A call without an answer is a failed generation, `engine:<kind>`; BackendError when the server is down or the budget spent.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        if temperature != self.endpoint.settings.temperature:
            raise ValueError(f"the endpoint samples at temperature {self.endpoint.settings.temperature}, not {temperature}")
        calls = ((request, sample) for request in requests for sample in range(request.samples))
        for _, generation in concurrently(self._ask, calls, self.endpoint.settings.max_in_flight):
            yield generation

    def close(self) -> None:
        self.endpoint.close()

    def _ask(self, call: tuple[GenerationRequest, int]) -> Generation:
        request, sample = call
        if stopped := self.endpoint.stopped:
            raise BackendError(f"model: {stopped}; what was answered is kept, and the same command goes on from there")
        reply = self.endpoint.ask(request.messages, sample=(request.seed + sample) % 2**31)
        failure = reply.failure if reply.failure in (None, "length") else f"engine:{reply.failure}"
        return Generation(request.key, sample, reply.text, failure, reply.completion_tokens)


def judge_for_rewards(settings: Mapping[str, Any], cache: str | None) -> LlmJudge:
    """Factory named by the GRPO backend; settings: fields of `EndpointConfig`."""
    return LlmJudge(Endpoint(EndpointConfig(**settings), Path(cache) if cache else None))
