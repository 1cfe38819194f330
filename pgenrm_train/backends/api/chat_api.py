"""One POST to an OpenAI-compatible `/chat/completions`, and the meaning of its failures.

Plain httpx: at hundreds of calls per second, a client that builds typed models of requests and answers costs
more than all the rest of the client side (benchmarks/speed/factory_slots.py).
"""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import httpx

from pgenrm_train.backends.api.answers import Reply
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import ConfigError

# Errors of reading an answer that is no chat completion.
NO_COMPLETION = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def url_and_headers(settings: EndpointConfig) -> tuple[str, dict[str, str]]:
    """Address and headers of a request.  Raises ConfigError if the address, model name or key is missing."""
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
    """The connections of all threads to one server."""

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
        """Request a completion; a cut-off or empty one is a Reply without text.

        Raises httpx.HTTPError if there is no answer in time, and one of `NO_COMPLETION` if the answer is no
        chat completion.
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
    """Read the full body by the time `end`.

    httpx limits each pause only, and some servers send blanks while they think.
    """
    parts = []
    for part in response.iter_bytes():
        parts.append(part)
        if time.monotonic() > end:
            raise httpx.ReadTimeout("the answer was not complete in time", request=response.request)
    return b"".join(parts)


def tokens_of(answer: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answers, as the server counts them; 0 if it does not."""
    usage = answer.get("usage") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def read_completion(answer: Any) -> Reply:
    """The reply in a server's JSON answer."""
    spent = tokens_of(answer)
    if answer.get("usage") and answer["choices"] == []:  # paid for, though empty
        return Reply(None, "empty", *spent)
    choice = answer["choices"][0]
    text = replace_surrogates(choice["message"]["content"])
    if choice.get("finish_reason") == "length":
        return Reply(None, "length", *spent)
    return Reply(text, None, *spent) if text and text.strip() else Reply(None, "empty", *spent)


def refusal(content: bytes) -> str:
    """The server's message of a refusal on one line: that of its error object, else the start of the body."""
    text = content[:2000].decode(errors="replace")
    try:
        error = json.loads(content)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return " ".join(str(text).split())[:200]


def replace_surrogates(text: str | None) -> str | None:
    """Replace half of a surrogate pair by U+FFFD.

    An emoji cut between two tokens leaves such a half, which no file can hold.
    """
    return text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def failure_of(error: Exception) -> str:
    """The failure of a `Reply` for an error of `ChatApi.post`."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"http_{error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return "connection" if isinstance(error, httpx.TransportError) else "malformed"


def is_transient_status(code: int) -> bool:
    """Whether an HTTP error may pass."""
    return code in (408, 409, 425, 429) or code >= 500


def is_transient(error: BaseException) -> bool:
    """Whether to try again: no connection, too slow, too many requests, a fault of the server."""
    if isinstance(error, httpx.HTTPStatusError):
        return is_transient_status(error.response.status_code)
    return isinstance(error, httpx.TransportError)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as the server requests."""
    try:
        return float(headers["retry-after"])
    except (KeyError, ValueError):
        return None
