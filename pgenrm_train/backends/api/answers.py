"""What an endpoint has answered and what that cost, on disk: reruns are free, a resume is exact, a budget holds over restarts.

An answer and its price are written in one transaction, so that neither is there without the other however the process ends.  An
answer that was paid for and yet is none (cut off, empty) is known too: asked again it would cost the same and be the same.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

PAID = "paid"
BOUGHT_FAILURES = ("length", "empty")


@dataclass(frozen=True, slots=True)
class Reply:
    """`text`, or None and why: timeout · connection · http_<code> · length · empty · malformed · circuit_open · budget · closed."""

    text: str | None
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class NoAnswers:
    """Nothing is kept."""

    def get(self, key: str) -> Reply | None:
        return None

    def add(self, key: str, reply: Reply) -> None: ...

    def pay(self, reply: Reply) -> None: ...

    def paid(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None: ...


class Answers:
    """Replies in a folder by the hash of what was asked; safe for threads and for several processes."""

    def __init__(self, folder: Path) -> None:
        import diskcache

        # JSON on disk (the default disk pickles) and no eviction: an answer was paid for
        self._cache = diskcache.Cache(str(folder), disk=diskcache.JSONDisk, eviction_policy="none")
        self._writing = threading.Lock()  # threads that met in SQLite's own lock would sleep, not queue

    def get(self, key: str) -> Reply | None:
        found = self._cache.get(key)
        return found and Reply(found["text"], found.get("failure"), found["in"], found["out"])

    def add(self, key: str, reply: Reply) -> None:
        """Keep what was paid for; failures that cost nothing are asked again."""
        if reply.text is None and reply.failure not in BOUGHT_FAILURES:
            return
        answer = {
            "text": reply.text,
            "failure": reply.failure,
            "in": reply.prompt_tokens,
            "out": reply.completion_tokens,
        }
        with self._writing, self._cache.transact():
            self._cache.set(key, answer)
            self._add_up(reply)

    def pay(self, reply: Reply) -> None:
        """Keep the price alone, of an answer that is kept elsewhere."""
        with self._writing, self._cache.transact():
            self._add_up(reply)

    def _add_up(self, reply: Reply) -> None:
        prompts, answers = self.paid()
        self._cache.set(PAID, [prompts + reply.prompt_tokens, answers + reply.completion_tokens])

    def paid(self) -> tuple[int, int]:
        """Tokens of prompts and of answers, of all starts and processes."""
        prompts, answers = self._cache.get(PAID) or (0, 0)
        return prompts, answers

    def close(self) -> None:
        self._cache.close()
