"""Use of an API: calls and tokens so far, their price, and the pace of the next calls."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from pgenrm_train.config import EndpointConfig

CHARACTERS_PER_TOKEN = 3.0  # a low guess before the first answers


def dollars(settings: EndpointConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """Price at the configured rates, by default 0."""
    return (
        prompt_tokens * settings.dollars_per_million_in + completion_tokens * settings.dollars_per_million_out
    ) / 1e6


@dataclass
class Usage:
    """Calls and tokens of this start; retries count in `tries` only.

    `failures` are by reason, with the server's last words on each in `words`; `earlier` are the tokens of
    earlier starts.
    """

    calls: int = 0
    tries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    earlier: tuple[int, int] = (0, 0)
    failures: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)

    @property
    def paid(self) -> tuple[int, int]:
        """Tokens of prompts and of answers in all starts."""
        return self.earlier[0] + self.prompt_tokens, self.earlier[1] + self.completion_tokens


class Pace:
    """Even starts of calls: at most `requests_per_minute` starts and `tokens_per_minute` tokens."""

    def __init__(self, settings: EndpointConfig) -> None:
        self._settings, self._lock, self._next_start = settings, threading.Lock(), 0.0
        # All answers count, cut-off and empty ones too, because the server's limit counts their tokens.
        self._answers = self._tokens = 0

    def learn(self, tokens: int) -> None:
        """Record the tokens of one answer."""
        with self._lock:
            self._answers, self._tokens = self._answers + 1, self._tokens + tokens

    def wait_seconds(self, characters: int, samples: int = 1) -> float:
        """Reserve the next start, and return the seconds until then.

        A call is expected to need the mean tokens of the calls so far; the first ones, their maximum.
        """
        settings, gap = self._settings, 0.0
        if settings.requests_per_minute is not None:
            gap = 60.0 / settings.requests_per_minute
        with self._lock:
            if settings.tokens_per_minute is not None:
                most = characters / CHARACTERS_PER_TOKEN + settings.max_tokens * samples
                expected = self._tokens / self._answers if self._answers else most
                gap = max(gap, 60.0 * expected / settings.tokens_per_minute)
            start = max(self._next_start, time.monotonic())
            self._next_start = start + gap
        return max(0.0, start - time.monotonic())
