"""Estimate calls, tokens, dollars and minutes of a stage that queries a language model, each as a range.

Low: one call per question, four characters per token, answers of `ANSWER_TOKENS`.  High: all calls allowed,
three characters per token, answers of the maximal length.  Minutes follow from the configured pace, or by
default from `TOKENS_PER_SECOND` of one stream.  Users configure prices (`dollars_per_million_in`, `…_out`);
without them dollars are not estimated.
"""

from collections.abc import Mapping, Sequence

from pgenrm_train.backends.api.usage import dollars
from pgenrm_train.backends.protocols import Estimate, Range
from pgenrm_train.config import EndpointConfig

ANSWER_TOKENS = 700  # of a chain
TOKENS_PER_SECOND = 50.0


def estimate(
    settings: EndpointConfig,
    prompt_characters: float | Range,
    questions: float,
    *,
    tries: int = 1,
    known_share: float = 0.0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Estimate:
    """Estimate the cost of `questions`, with at most `tries` calls per question.

    `prompt_characters` is the mean length of a prompt, or (low, high).  A `known_share` of the questions is
    answered on disk and costs nothing.
    """
    span = prompt_characters if isinstance(prompt_characters, tuple) else (prompt_characters,) * 2
    unanswered = questions * (1.0 - known_share)
    calls = (unanswered, unanswered * tries)
    prompts = (calls[0] * span[0] / 4.0, calls[1] * span[1] / 3.0)
    answers = (calls[0] * min(answer_tokens, settings.max_tokens), calls[1] * settings.max_tokens)
    low, high = (dollars(settings, round(p), round(a)) for p, a in zip(prompts, answers, strict=True))
    fast, slow = (_minutes(settings, *figures) for figures in zip(calls, prompts, answers, strict=True))
    return Estimate(
        calls,
        prompts,
        answers,
        (low, high) if settings.dollars_per_million_in or settings.dollars_per_million_out else None,
        (fast, slow),
    )


def announce(role: str, settings: EndpointConfig, expected: Estimate) -> Estimate:
    """Print the estimate, and a warning if it exceeds the budget; return it."""
    price = _span(expected.dollars, "{:,.2f}") + " dollars" if expected.dollars else "no price configured"
    print(
        f"{role} {settings.name}: {_span(expected.calls)} calls, {_span(expected.prompt_tokens)} tokens in, "
        f"{_span(expected.completion_tokens)} out, {price}, {_span(expected.minutes, '{:,.1f}')} minutes at "
        f"{settings.max_in_flight} calls at a time",
        flush=True,
    )
    limit = settings.max_dollars
    if limit is not None and expected.dollars and expected.dollars[1] > limit:
        certainty = "will" if expected.dollars[0] > limit else "may"
        print(
            f"warning: {role}.max_dollars={limit:g} {certainty} be spent before the end; the run then "
            "stops and keeps its answers; the same command with a higher limit continues",
            flush=True,
        )
    return expected


def characters(prompts: Sequence[Sequence[Mapping[str, str]]]) -> float:
    """Mean length of the texts of chats."""
    return sum(len(message["content"]) for chat in prompts for message in chat) / max(1, len(prompts))


def _minutes(settings: EndpointConfig, calls: float, prompts: float, answers: float) -> float:
    by_requests = calls / settings.requests_per_minute if settings.requests_per_minute else 0.0
    by_tokens = (prompts + answers) / settings.tokens_per_minute if settings.tokens_per_minute else 0.0
    streaming = answers / TOKENS_PER_SECOND / 60.0 / max(1.0, min(settings.max_in_flight, calls))
    return max(by_requests, by_tokens, streaming)


def _span(ends: Range, form: str = "{:,.0f}") -> str:
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} to {high}"
