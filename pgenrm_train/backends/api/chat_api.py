"""One POST to an OpenAI-compatible `/chat/completions`, and what its failures mean.

Plain httpx: at hundreds of calls a second a client that builds typed models of every request and answer costs more than all the rest
of the client side (benchmarks/speed/factory_slots.py).
"""

from __future__ import annotations

import json
import os
import time

import httpx

from pgenrm_train.backends.api.answers import Reply
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import ConfigError


def url_and_headers(settings: EndpointConfig) -> tuple[str, dict[str, str]]:
    """Where to post, and as whom.  Raises ConfigError when the address, the model's name or the key is missing."""
    if not settings.base_url or not settings.name:
        raise ConfigError(
            "an endpoint needs base_url (e.g. http://localhost:8000/v1) and name (the served model)"
        )
    headers = {"content-type": "application/json"}
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise ConfigError(
                f"the environment variable {settings.api_key_env} named by api_key_env is not set"
            )
        headers["authorization"] = f"Bearer {key}"
    return f"{settings.base_url.rstrip('/')}/chat/completions", headers


class ChatApi:
    """The connections to one server, for threads."""

    def __init__(self, settings: EndpointConfig) -> None:
        self._url, headers = url_and_headers(settings)
        self._seconds = settings.timeout_seconds
        self._client = httpx.Client(
            headers=headers,
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.max_in_flight),
            follow_redirects=True,
        )

    def post(self, payload: bytes) -> Reply:
        """The server's completion; a cut-off or empty one is a Reply without text.

        Raises httpx.HTTPError when there is no answer in time, and ValueError, TypeError, LookupError, AttributeError or RecursionError
        when the answer is no chat completion.
        """
        end = time.monotonic() + self._seconds
        with self._client.stream("POST", self._url, content=payload) as response:
            content = _read(response, end)
        if not response.is_success:
            raise httpx.HTTPStatusError(refusal(content), request=response.request, response=response)
        return read_completion(json.loads(content))

    def close(self) -> None:
        self._client.close()


def _read(response: httpx.Response, end: float) -> bytes:
    """The body, whole by the time `end`: httpx's own limit is on each pause, and some servers send blanks while they think."""
    parts = []
    for part in response.iter_bytes():
        parts.append(part)
        if time.monotonic() > end:
            raise httpx.ReadTimeout("the answer was not whole in time", request=response.request)
    return b"".join(parts)


def read_completion(answer: dict[str, object]) -> Reply:
    used = answer.get("usage") or {}
    spent = (int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))  # type: ignore[attr-defined]
    if used and answer["choices"] == []:  # paid for all the same
        return Reply(None, "empty", *spent)
    choice = answer["choices"][0]  # type: ignore[index]
    text = whole(choice["message"]["content"])
    if choice.get("finish_reason") == "length":
        return Reply(None, "length", *spent)
    return Reply(text, None, *spent) if text and text.strip() else Reply(None, "empty", *spent)


def refusal(content: bytes) -> str:
    """A server's own words for a refusal, on one line: the message of its error object, else how the body begins."""
    text = content[:2000].decode(errors="replace")
    try:
        error = json.loads(content)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return " ".join(str(text).split())[:200]


def whole(text: str | None) -> str | None:
    """The text with U+FFFD for half of a surrogate pair, as an emoji cut between two tokens leaves it: no file could hold that."""
    return text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def failure_of(error: Exception) -> str:
    """The reason that a `Reply` gives for an error of `ChatApi.post`."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"http_{error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return "connection" if isinstance(error, httpx.TransportError) else "malformed"


def is_transient(error: BaseException) -> bool:
    """Worth another try: no connection, too slow, too many requests, the server's own fault."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 409, 425, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asked us to wait."""
    if not isinstance(error, httpx.HTTPStatusError):
        return None
    try:
        return float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
