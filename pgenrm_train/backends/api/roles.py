"""Teacher, writer of criteria and judge: language models behind an `Endpoint`."""

import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pgenrm_train.backends.api.answers import Reply
from pgenrm_train.backends.api.costs import announce, characters, estimate
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.usage import dollars
from pgenrm_train.backends.protocols import Estimate, Generation, Spending, estimate_sample
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.masking import FullView
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import Example, HistoryItem
from pgenrm_train.rewards import synthetic_criteria as synthesis
from pgenrm_train.rewards.judging import SCHEMA, judge_messages, no_verdict, read_verdict, unwrapped
from pgenrm_train.rewards.synthetic_criteria import synthesis_messages
from pgenrm_train.rewards.training_rows import RowExtra, withheld_signals

CRITERIA_TOKENS = 120  # of a typical answer


class LlmTeacher:
    """A writer of chains from history and explicit signals (METHOD §3); see `protocols.Teacher`."""

    by_rule = False

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        # The endpoint admits `slots` calls; the others have their prompts ready when one is free.
        slots = endpoint.settings.max_in_flight
        self.in_flight = slots + slots // 4

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        if stopped := self.endpoint.stopped:
            raise BackendError(f"teacher: {stopped}")
        messages = self._messages(example)
        if complaint is not None:
            again = (
                f"Your last answer could not be used ({complaint}). "
                "Write it anew, in exactly the format asked for."
            )
            messages.append({"role": "user", "content": again})
        reply = self.endpoint.complete(messages, sample=attempt)
        if reply.text is not None:  # a fence around all of it would count as text after the end marker
            reply = replace(reply, text=unwrapped(reply.text))
        return _generation(example.pair_id, attempt, reply)

    def expect(self, examples: Sequence[Example], questions: int, tries: int) -> Estimate:
        prompts = [self._messages(example) for example in examples]
        share = sum(self.endpoint.knows(prompt) for prompt in prompts) / max(1, len(prompts))
        settings = self.endpoint.settings
        expected = estimate(settings, characters(prompts), questions, tries=tries, known_share=share)
        return announce("teacher", settings, expected)

    def spending(self) -> Spending:
        return self.endpoint.spending()

    def _messages(self, example: Example) -> list[dict[str, str]]:
        return chat_messages(
            FullView(example.context, example.history, example.responses, example.explicit),
            instructions=self.endpoint.settings.instructions,
        )


class LlmCriteria:
    """A writer of criteria for users who stated none; see `protocols.CriteriaWriter`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.in_flight = endpoint, endpoint.settings.max_in_flight

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation:
        if stopped := self.endpoint.stopped:
            raise BackendError(f"teacher: {stopped}")
        reply = self.endpoint.complete(synthesis_messages(votes), sample=attempt, schema=synthesis.SCHEMA)
        return _generation(user_id, attempt, reply)

    def expect(self, users: Sequence[Sequence[HistoryItem]], tries: int) -> Estimate:
        some = [synthesis_messages(votes) for votes in estimate_sample(users)]
        expected = estimate(
            self.endpoint.settings, characters(some), len(users), tries=tries, answer_tokens=CRITERIA_TOKENS
        )
        return announce("teacher", self.endpoint.settings, expected)

    def spending(self) -> Spending:
        return self.endpoint.spending()


class LlmJudge:
    """A judge of chains by the withheld signals; see `protocols.Judge`.

    A failure is None, and counted by kind.

    One chain in `AUDIT_EVERY`, chosen by its text, is judged twice, and the absolute difference of the scores
    is kept.
    """

    AUDIT_EVERY = 50

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.lock = threading.Lock()
        self.failures: Counter[str] = Counter()
        self.differences: list[float] = []

    def __call__(self, chain_text: str, example: RowExtra) -> float | None:
        withheld = withheld_signals(example)
        audited = zlib.crc32(chain_text.encode(errors="replace")) % self.AUDIT_EVERY == 0
        score = self._score(chain_text, withheld, 0)
        if audited and score is not None and (again := self._score(chain_text, withheld, 1)) is not None:
            with self.lock:
                self.differences.append(abs(score - again))
        return score

    def metrics(self) -> dict[str, float]:
        """Sums since the start, for a step's metrics.

        `no_verdict/<kind>` counts chains whose process reward is null.
        """
        usage = self.endpoint.usage
        return {
            "calls": usage.calls,
            "tries": usage.tries,
            "from_cache": usage.cached,
            "dollars": dollars(self.endpoint.settings, usage.prompt_tokens, usage.completion_tokens),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "judged_twice": len(self.differences),
            "judged_twice_difference": sum(self.differences),
            **{f"no_verdict/{kind}": count for kind, count in self.failures.items()},
        }

    def _score(self, chain_text: str, withheld: Mapping[str, object], sample: int) -> float | None:
        reply = self.endpoint.complete(judge_messages(chain_text, withheld), sample=sample, schema=SCHEMA)
        verdict = read_verdict(reply.text) if reply.text is not None else None
        if verdict is None:
            with self.lock:
                self.failures[reply.failure or no_verdict(reply.text or "")] += 1
            return None
        return verdict.score


def _generation(key: str, sample: int, reply: Reply) -> Generation:
    return Generation(key, sample, reply.text, reply.failure, reply.completion_tokens, reply.words)


def judge_for_rewards(settings: EndpointConfig, cache: Path | None) -> LlmJudge:
    """Factory that the GRPO backend loads by name; `cache` is the folder of the judge's answers."""
    return LlmJudge(Endpoint(settings, cache))
