"""Answers of an endpoint and their cost, on disk: free reruns, exact resumes, one budget over restarts.

An answer and its cost are written in one transaction, so that neither exists without the other after a crash.
Paid failures (cut off, empty) are kept too: a second call would cost the same and fail again.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.chains.reasoning import strip_reasoning

PAID = "paid"
# Failures of an answer that came: it shows that the API works, and its tokens are paid for.
OF_THE_ANSWER = ("length", "empty", "reasoning", "refusal", "content_filter")
PROMPT_REFUSED = "prompt_refused"  # by a server that answers other prompts with the same fields


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of an answer, or the reason why there is none.

    Failures: `OF_THE_ANSWER` · prompt_refused · timeout · connection · tls · redirect · http_<code> · error ·
    html · event_stream · malformed · circuit_open · budget · closed.  `words` are the server's own.
    """

    text: str | None
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    words: str = ""


class Answers:
    """Replies in a folder by the hash of the request; safe for threads and for several processes."""

    def __init__(self, folder: Path) -> None:
        import diskcache

        # JSON on disk, because the default disk pickles; no eviction, because answers are paid for.
        self._cache = diskcache.Cache(str(folder), disk=diskcache.JSONDisk, eviction_policy="none")
        self._any_refused = bool(self._cache.get(PROMPT_REFUSED))  # else no call has to look
        self._writing = threading.Lock()  # threads would sleep at SQLite's own lock, not queue

    def get(self, key: str) -> Reply | None:
        if (row := self._cache.get(key)) is None:
            return None
        text = row["text"] and strip_reasoning(row["text"], unclosed=True)  # of an older run
        failure = row.get("failure") or (None if text else "reasoning")
        return Reply(text or None, failure, row["in"], row["out"])

    def add(self, key: str | None, reply: Reply) -> None:
        """Keep a paid reply and its cost; without a key the cost alone, of an answer that is kept elsewhere.

        A call that failed at no cost is not kept, so that the endpoint repeats it.
        """
        if reply.text is None and reply.failure not in OF_THE_ANSWER:
            return
        answer = {
            "text": reply.text,
            "failure": reply.failure,
            "in": reply.prompt_tokens,
            "out": reply.completion_tokens,
        }
        with self._writing, self._cache.transact():
            if key is not None:
                self._cache.set(key, answer)
            prompts, answers = self.paid()
            self._cache.set(PAID, [prompts + reply.prompt_tokens, answers + reply.completion_tokens])

    def refuse(self, key: str, words: str) -> None:
        """Keep a prompt that the server refuses; another start does not send it again."""
        with self._writing, self._cache.transact():
            self._cache.set(f"{PROMPT_REFUSED}/{key}", words)
            self._cache.set(PROMPT_REFUSED, True)

    def refusal(self, key: str) -> str | None:
        """The server's words of a refusal that an earlier start kept."""
        words: str | None = self._cache.get(f"{PROMPT_REFUSED}/{key}") if self._any_refused else None
        return words

    def paid(self) -> tuple[int, int]:
        """Tokens of prompts and of answers in all starts and processes."""
        prompts, answers = self._cache.get(PAID) or (0, 0)
        return prompts, answers

    def close(self) -> None:
        self._cache.close()
