"""What a stage will ask of a language model, told before it asks: calls, tokens, dollars and minutes, each from … to ….

Low: one call a question, four characters a token, answers of `ANSWER_TOKENS`.  High: every call that may be made, three characters a
token, answers as long as they may be.  Minutes follow from the stated pace; where none is stated, from `TOKENS_PER_SECOND` of one
stream.  The rates for money are the user's (`dollars_per_million_in`, `…_out`); without them there is no price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgenrm_train.backends.api.endpoint import dollars
from pgenrm_train.config import EndpointConfig

ANSWER_TOKENS = 700  # of a chain
TOKENS_PER_SECOND = 50.0

Range = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """Each a (low, high); `dollars` is None where no price is stated."""

    calls: Range
    prompt_tokens: Range
    completion_tokens: Range
    dollars: Range | None
    minutes: Range

    def facts(self) -> dict[str, Any]:
        """For manifests."""
        price = {"dollars": [round(d, 4) for d in self.dollars]} if self.dollars else {}
        return {
            "calls": [round(c) for c in self.calls], "prompt tokens": [round(t) for t in self.prompt_tokens],
            "completion tokens": [round(t) for t in self.completion_tokens], **price, "minutes": [round(m, 1) for m in self.minutes],
        }  # fmt: skip


def estimate(
    settings: EndpointConfig,
    prompt_characters: float | Range,
    questions: float,
    *,
    tries: int = 1,
    known_share: float = 0.0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Estimate:
    """`prompt_characters`: mean length of a prompt, or (low, high); `tries`: calls a question at most; `known_share` of the questions is
    answered already and costs nothing."""
    shortest, longest = (
        prompt_characters if isinstance(prompt_characters, tuple) else (prompt_characters, prompt_characters)
    )
    asked = questions * (1.0 - known_share)
    calls = (asked, asked * tries)
    prompts = (calls[0] * shortest / 4.0, calls[1] * longest / 3.0)
    answers = (calls[0] * min(answer_tokens, settings.max_tokens), calls[1] * settings.max_tokens)
    priced = settings.dollars_per_million_in or settings.dollars_per_million_out
    return Estimate(
        calls,
        prompts,
        answers,
        (_dollars(settings, prompts[0], answers[0]), _dollars(settings, prompts[1], answers[1]))
        if priced
        else None,
        (
            _minutes(settings, calls[0], prompts[0], answers[0]),
            _minutes(settings, calls[1], prompts[1], answers[1]),
        ),
    )


def announce(who: str, settings: EndpointConfig, found: Estimate) -> Mapping[str, Any]:
    """Tell the estimate, and what it means for the budget; returns its facts."""
    price = _span(found.dollars, "{:,.2f}") + " dollars" if found.dollars else "no price stated"
    print(
        f"{who} {settings.name}: {_span(found.calls)} calls, {_span(found.prompt_tokens)} tokens in, {_span(found.completion_tokens)} out, "
        f"{price}, {_span(found.minutes, '{:,.1f}')} minutes at {settings.max_in_flight} calls a time",
        flush=True,
    )
    limit = settings.max_dollars
    if limit is not None and found.dollars and found.dollars[1] > limit:
        sure = "will" if found.dollars[0] > limit else "may"
        print(
            f"warning: {who}.max_dollars={limit:g} {sure} be spent before the end; the run then stops, what was answered is kept, and "
            "the same command with a higher limit goes on",
            flush=True,
        )
    return found.facts()


def characters(prompts: Sequence[Sequence[Mapping[str, str]]]) -> float:
    """Mean length of some chats' texts."""
    return sum(len(message["content"]) for chat in prompts for message in chat) / max(1, len(prompts))


def _dollars(settings: EndpointConfig, prompts: float, answers: float) -> float:
    return dollars(settings, round(prompts), round(answers))


def _minutes(settings: EndpointConfig, calls: float, prompts: float, answers: float) -> float:
    by_requests = calls / settings.requests_per_minute if settings.requests_per_minute else 0.0
    by_tokens = (prompts + answers) / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
    streaming = answers / TOKENS_PER_SECOND / 60.0 / max(1.0, min(settings.max_in_flight, calls))
    return max(by_requests, by_tokens, streaming)


def _span(ends: Range, form: str = "{:,.0f}") -> str:
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} to {high}"
