"""Teacher and judge that are language models behind an `Endpoint`."""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.backends.api.costs import announce, characters, estimate
from pgenrm_train.backends.api.endpoint import Endpoint, dollars
from pgenrm_train.backends.protocols import Generation
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.masking import FullView
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import Example, HistoryItem
from pgenrm_train.rewards import synthetic_criteria as synthesis
from pgenrm_train.rewards.judging import SCHEMA, judge_messages, read_verdict
from pgenrm_train.rewards.synthetic_criteria import synthesis_messages

MEASURED = 200  # users whose prompts tell what all will cost
CRITERIA_TOKENS = 120  # of an answer, as a rule


class LlmTeacher:
    """Writes chains from history and explicit signals, as METHOD §3 asks; see `base.Teacher`."""

    by_rule = False

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        slots = endpoint.settings.max_in_flight
        self.in_flight = (
            slots + slots // 4
        )  # the endpoint lets `slots` through; the others have their prompts ready when one is free

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        if stopped := self.endpoint.stopped:
            raise BackendError(f"teacher: {stopped}")
        messages = self._messages(example)
        if complaint is not None:
            again = f"Your last answer could not be used ({complaint}). Write it anew, in exactly the format asked for."
            messages.append({"role": "user", "content": again})
        reply = self.endpoint.ask(messages, sample=attempt)
        return Generation(example.pair_id, attempt, reply.text, reply.failure, reply.completion_tokens)

    def expect(self, examples: Sequence[Example], questions: int, tries: int) -> Mapping[str, Any]:
        prompts = [self._messages(example) for example in examples]
        known = sum(self.endpoint.knows(prompt) for prompt in prompts) / max(1, len(prompts))
        settings = self.endpoint.settings
        return announce(
            "teacher",
            settings,
            estimate(settings, characters(prompts), questions, tries=tries, known_share=known),
        )

    def facts(self) -> Mapping[str, Any]:
        return self.endpoint.usage.facts(self.endpoint.settings)

    def _messages(self, example: Example) -> list[dict[str, str]]:
        view = FullView(example.context, example.history, example.responses, example.explicit)
        return chat_messages(view, instructions=self.endpoint.settings.instructions)


class LlmCriteria:
    """Infers criteria of users who stated none; see `base.CriteriaWriter`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.in_flight = endpoint, endpoint.settings.max_in_flight

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation:
        if stopped := self.endpoint.stopped:
            raise BackendError(f"teacher: {stopped}")
        reply = self.endpoint.ask(synthesis_messages(votes), sample=attempt, schema=synthesis.SCHEMA)
        return Generation(user_id, attempt, reply.text, reply.failure, reply.completion_tokens)

    def expect(self, users: Sequence[Sequence[HistoryItem]], tries: int) -> Mapping[str, Any]:
        some = [synthesis_messages(votes) for votes in users[:: max(1, len(users) // MEASURED)]]
        found = estimate(
            self.endpoint.settings, characters(some), len(users), tries=tries, answer_tokens=CRITERIA_TOKENS
        )
        return announce("teacher", self.endpoint.settings, found)

    def facts(self) -> Mapping[str, Any]:
        return self.endpoint.usage.facts(self.endpoint.settings)


class LlmJudge:
    """Rates chains against the withheld signals; see `base.Judge`.  Every failure is None and counted by kind.

    One chain in `AUDIT_EVERY`, the same ones whenever they come, is judged twice, and the absolute difference of the scores is kept.
    """

    AUDIT_EVERY = 50

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.lock = threading.Lock()
        self.failures: Counter[str] = Counter()
        self.differences: list[float] = []

    def __call__(self, chain_text: str, example: Mapping[str, Any]) -> float | None:
        said = json.loads(example["explicit"])
        audited = zlib.crc32(chain_text.encode(errors="replace")) % self.AUDIT_EVERY == 0
        score = self._score(chain_text, said, 0)
        if audited and score is not None and (again := self._score(chain_text, said, 1)) is not None:
            with self.lock:
                self.differences.append(abs(score - again))
        return score

    def metrics(self) -> dict[str, float]:
        """Sums since the start, for the metrics of a step; `no_verdict/<kind>` are chains whose process reward is null."""
        usage = self.endpoint.usage
        return {
            "calls": usage.calls, "tries": usage.tries, "from_cache": usage.cached, "dollars": dollars(self.endpoint.settings, usage.prompt_tokens, usage.completion_tokens),
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


def judge_for_rewards(settings: EndpointConfig, cache: Path | None) -> LlmJudge:
    """Factory that the GRPO backend loads by name; `cache` is the folder of the judge's answers."""
    return LlmJudge(Endpoint(settings, cache))
