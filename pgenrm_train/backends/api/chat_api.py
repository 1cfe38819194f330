"""One POST to an OpenAI-compatible `/chat/completions`, and the meaning of its answer or failure.

Plain httpx: at hundreds of calls per second, a client that builds typed models of requests and answers costs
more than all the rest of the client side (benchmarks/speed/factory_slots.py).
"""

import html
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from pgenrm_train.chains.reasoning import strip_reasoning
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.http import COMPLETIONS, client, key_of, lost_connection, proxy_for, service

# Errors of reading an answer that is no chat completion.
NO_COMPLETION = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)
WORDS = 200  # characters of a server's message
MOVES = 3  # redirects that one call follows


class Trouble(Exception):
    """A try without an answer: its kind, the server's words, and whether another try may succeed."""

    def __init__(
        self, kind: str, words: str = "", *, passing: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(kind, words)
        self.kind, self.words, self.passing, self.retry_after = kind, words, passing, retry_after


@dataclass(frozen=True, slots=True)
class Choice:
    """One text of an answer, or the reason why there is none; a text that was cut off has both."""

    text: str | None
    failure: str | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The choices of one answer, at least one, and the tokens that the server counts; 0 if it does not."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int


def url_and_headers(settings: EndpointConfig) -> tuple[str, dict[str, str]]:
    """Address and headers of a request.  Raises ConfigError if the address, model name or key is missing."""
    if not settings.base_url or not settings.name:
        raise ConfigError(
            "an endpoint needs base_url (e.g. http://localhost:8000/v1) and name (the served model)"
        )
    headers = {"content-type": "application/json"}
    if settings.api_key_env is not None:
        headers["authorization"] = f"Bearer {key_of(settings.api_key_env)}"
    return service(settings.base_url, COMPLETIONS), headers


class ChatApi:
    """The connections of all threads to one server."""

    def __init__(self, settings: EndpointConfig) -> None:
        self._url, headers = url_and_headers(settings)
        self._seconds = settings.timeout_seconds
        self._direct = settings.kind == "vllm"  # this run's own server, which no proxy reaches
        self._client = client(
            self._url,
            direct=self._direct,
            headers=headers,
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.max_in_flight),
        )

    def post(self, payload: bytes) -> Completion:
        """Request a completion.  Raises Trouble if there is none."""
        end = time.monotonic() + self._seconds
        try:
            for _ in range(MOVES):
                with self._client.stream("POST", self._url, content=payload) as response:
                    content = _read(response, end)
                if (moved := moved_to(self._url, response.status_code, response.headers)) is None:
                    break
                self._url = moved
        except httpx.HTTPError as error:
            kind, words, passing = lost_connection(error, None if self._direct else proxy_for(self._url))
            raise Trouble(kind, words, passing=passing) from None
        except httpx.InvalidURL as error:  # of a redirect
            raise Trouble("redirect", f"a redirect to no address ({error})") from None
        return read_answer(response.status_code, response.headers, content)

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


# ---- answers -----------------------------------------------------------------------------------------------


def read_answer(status: int, headers: Mapping[str, str], content: bytes) -> Completion:
    """The completion in a server's answer.  Raises Trouble with the server's words for anything else."""
    if 300 <= status < 400:
        place = headers.get("location", "no address")
        raise Trouble("redirect", f"HTTP {status} to {place[:WORDS]}; base_url must be the final address")
    if not 200 <= status < 300:
        raise Trouble(
            f"http_{status}",
            refusal(content),
            passing=is_transient_status(status),
            retry_after=retry_after(headers),
        )
    try:
        answer = _parsed(content, headers)
    except (ValueError, RecursionError):
        raise _no_json(content) from None
    try:
        if (error := _error_in(answer)) is not None:
            raise error
        return _completion(answer)
    except NO_COMPLETION:
        raise Trouble("malformed", f"no chat completion: {refusal(content)}") from None


def _parsed(content: bytes, headers: Mapping[str, str]) -> Any:
    """A JSON body; bytes that are no UTF-8 are read as the header says, else replaced by U+FFFD.

    A text that was cut within a character leaves such bytes, and its answer is paid for.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        charset = re.search(r"charset=\"?([\w.:-]+)", headers.get("content-type", ""))
        try:
            text = content.decode(charset[1] if charset else "utf-8", "replace")
        except LookupError:  # no charset that Python knows
            text = content.decode(errors="replace")
        return json.loads(text)


def _no_json(content: bytes) -> Trouble:
    text = content[:2000].decode(errors="replace").strip()
    if re.match(r"(data|event|id|retry)?:", text):
        return Trouble("event_stream", f"an event stream, which was not requested: {_line(text)}")
    if text.startswith("<"):
        return Trouble("html", f"a page and no API: {_title(text)}")
    return Trouble("malformed", f"no JSON: {_line(text)}" if text else "an empty body")


def _error_in(answer: Any) -> Trouble | None:
    """The error that a server reports under HTTP 200, by its code; None if there is none."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    choices = answer.get("choices") or [{}]
    failed = all(_has_failed(choice) for choice in choices)
    error = choices[0].get("error") if failed else not answer.get("choices") and answer.get("error")
    if failed and not error:
        error = {"message": "the server broke off the answer", "code": 502}
    if answer.get("object") == "error":
        error = error or answer
    if not error:
        return None
    code = _code(error) if isinstance(error, dict) else 0
    words = refusal(json.dumps({"error": error}).encode())
    if not 400 <= code < 600:
        return Trouble("error", words)
    return Trouble(f"http_{code}", words, passing=is_transient_status(code))


def _has_failed(choice: Mapping[str, Any]) -> bool:
    """Whether a router marks the choice as one that its provider broke off."""
    return bool(choice.get("error")) or choice.get("finish_reason") == "error"


def _code(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error object names by number or by type; 0 for none."""
    names = [str(error.get(name)) for name in ("code", "status", "status_code", "type")]
    for name in names:
        if re.fullmatch(r"[45]\d\d", name):
            return int(name)
    text = " ".join(names).lower()
    if "rate_limit" in text or "resource_exhausted" in text:
        return 429
    return 503 if re.search("overloaded|server_error|unavailable|timeout|internal", text) else 0


def _completion(answer: Any) -> Completion:
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    spent = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    if counts and answer["choices"] == []:  # paid for, though empty
        return Completion((Choice(None, "empty"),), *spent)
    choices = tuple(map(_choice, answer["choices"]))
    if not choices:
        raise ValueError("no choices")
    return Completion(choices, *spent)


def _count(value: object) -> int:
    """A number of tokens, also as text; 0 for anything that is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0
    return max(0, int(number)) if math.isfinite(number) else 0


def _choice(choice: Any) -> Choice:
    message = choice["message"]
    written = _text_of(message.get("content"))
    text = strip_reasoning(replace_surrogates(written), unclosed=True)
    if _has_failed(choice):
        return Choice(None, "error", refusal(json.dumps(choice).encode()))
    if choice.get("finish_reason") == "length":
        return Choice(text, "length")
    if choice.get("finish_reason") == "content_filter":
        return Choice(None, "content_filter")
    if text.strip():
        return Choice(text)
    if words := message.get("refusal"):
        return Choice(None, "refusal", _line(str(words)))
    thoughts = message.get("reasoning_content") or message.get("reasoning") or written.strip()
    if thoughts or (isinstance(message["content"], list) and message["content"]):
        return Choice(None, "reasoning", "reasoning alone, without an answer after it")
    return Choice(None, "empty")


def _text_of(content: object) -> str:
    """The text of a message: a string, or the text parts of a list.  Raises TypeError for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    if not isinstance(content, dict):
        raise TypeError("content")
    if (content.get("type") or "text") not in ("text", "output_text"):
        return ""
    return _text_of(content["text"] if "text" in content else content["value"])


def refusal(content: bytes) -> str:
    """The server's message of a refusal on one line: that of its error object, else the start of the body."""
    text = content[:2000].decode(errors="replace")
    try:
        answer = json.loads(content)
        answer = answer[0] if isinstance(answer, list) else answer
        error = answer.get("error") or answer.get("detail") or answer["message"]
        error = error[0] if isinstance(error, list) else error
        text = (error.get("message") or error["msg"]) if isinstance(error, dict) else str(error)
    except NO_COMPLETION:
        text = _title(text)
    return _line(str(text))


def _title(text: str) -> str:
    """The title of a page, else the text as it is."""
    title = re.search(r"<title[^>]*>([^<]+)", text, re.IGNORECASE)
    return _line(html.unescape(title[1]) if title else text)


def _line(text: str) -> str:
    """One line, without what a terminal would obey."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:WORDS]


def replace_surrogates(text: str) -> str:
    """Replace half of a surrogate pair by U+FFFD.

    An emoji cut between two tokens leaves such a half, which no file can hold.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_transient_status(code: int) -> bool:
    """Whether an HTTP error may pass."""
    return code in (408, 409, 425, 429) or code >= 500


def may_be_a_field(failure: str | None) -> bool:
    """Whether a server may refuse a field of the request with this failure, by HTTP's or its own rules."""
    code = (failure or "").removeprefix("http_")
    return code in ("error", "500", "501", "505") or (
        code.startswith("4") and code not in ("401", "403", "408", "429")
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as the server requests by a number or a date; None if it requests nothing."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            now = headers.get("date")
            begun = parsedate_to_datetime(now).timestamp() if now else time.time()
            seconds = parsedate_to_datetime(value).timestamp() - begun
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def moved_to(url: str, status: int, headers: Mapping[str, str]) -> str | None:
    """Where to repeat a call by a redirect that keeps it: on the same host, and never from TLS to none."""
    if status not in (307, 308) or not headers.get("location"):
        return None
    try:
        before, moved = urlsplit(url), urlsplit(urljoin(url, headers["location"]))
        kept = moved.hostname == before.hostname and moved.scheme in (before.scheme, "https")
        return moved.geturl() if kept and moved.port != 0 else None
    except ValueError:  # brackets or a port that cannot be
        return None
