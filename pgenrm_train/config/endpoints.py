"""Settings of models behind an OpenAI-compatible API, the same for teacher, judge and model under test."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pgenrm_train.config.setting import setting

# Settings of teacher and judge that an answer depends on.
ANSWER_KEYS = ("kind", "name", "max_tokens", "temperature", "structured", "instructions")
# Settings of every role that an answer depends on where they are set; older runs have none.
FIELD_KEYS = ("extra_body", "leave_out")
# Fields of a request that have a setting of their own, or that the client relies on.
OWN_FIELDS = (
    "model",
    "messages",
    "n",
    "stream",
    "seed",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
)
# Beginnings of keys that might pass for names of variables.
_KEY = re.compile(r"(sk|gsk|hf|xai|r8|pplx|key|fw|nvapi|AIza|ghp|glpat)[_-]?\w*\d")
# Names of fields, and values, that are secret keys: settings are written into files.
_SECRET_NAME = re.compile(r"(?i)(api_?key|authorization|(access_?)?token|password|secret)")
_SECRET_VALUE = re.compile(r"(Bearer |(sk|gsk|hf|xai|r8|pplx|nvapi|ghp|glpat)[_-]|AIza)[\w-]{10,}")


@dataclass
class ApiConfig:
    """What any role may set about its server and its requests."""

    base_url: str | None = setting(None, "address of the server, e.g. http://localhost:8000/v1")
    api_key_env: str | None = setting(None, "environment variable that holds the key")
    requests_per_minute: float | None = setting(None, "pace of the calls; null: no limit", gt=0)
    tokens_per_minute: float | None = setting(
        None, "pace of prompts and answers together; null: no limit", gt=0
    )
    timeout_seconds: float = setting(120.0, "longest wait for one answer", gt=0)
    attempts: int = setting(
        5, "tries per call, with exponential backoff, on 429, 5xx, time-outs and lost connections", gt=0
    )
    give_up_after: int = setting(20, "calls that fail in a row before the server counts as down", gt=0)
    max_tokens_field: str = setting(
        "max_tokens",
        "the request's field for the longest answer; OpenAI's reasoning models need max_completion_tokens",
        choices=("max_tokens", "max_completion_tokens"),
    )
    extra_body: dict[str, Any] = setting(
        {}, "further fields of every request, each key with a plus, e.g. +model.extra_body.top_k=20"
    )
    leave_out: list[str] = setting(
        [],
        "fields that the server refuses; system puts the instructions into the user's message",
        choices=("seed", "temperature", "system"),
    )
    dollars_per_million_in: float = setting(0.0, "price of prompt tokens")
    dollars_per_million_out: float = setting(0.0, "price of answer tokens")
    max_dollars: float | None = setting(None, "spending that stops the run; answers stay in the cache")
    max_total_tokens: int | None = setting(None, "tokens that stop the run; answers stay in the cache")


@dataclass
class EndpointConfig(ApiConfig):
    kind: str = setting(
        "none", "oracle and features are rules; endpoint is an API; vllm is served by the run"
    )
    name: str | None = setting(None, "the served model; with vllm a checkpoint folder or hub id")
    gpus: int = setting(1, "GPUs of a vLLM server that the run starts", gt=0)
    instructions: bool = setting(True, "teacher only: false for a model that has learnt the task from chains")
    max_in_flight: int = setting(64, "calls at the same time", gt=0)
    max_tokens: int = setting(2048, "longest answer", gt=0)
    temperature: float = setting(0.7, "sampling temperature")
    structured: str = setting(
        "json_schema", "how a judge's answer is constrained", choices=("json_schema", "json_object", "none")
    )


@dataclass
class TeacherConfig(EndpointConfig):
    kind: str = setting(
        "oracle",
        "oracle knows PersonaWorld; features is a rule on texts; endpoint: an API; vllm: served by the run",
        choices=("oracle", "features", "endpoint", "vllm"),
    )


@dataclass
class JudgeConfig(EndpointConfig):
    kind: str = setting(
        "none",
        "none: no process reward; oracle knows PersonaWorld; endpoint: an API; vllm: served by the run",
        choices=("oracle", "none", "endpoint", "vllm"),
    )


def api_problems(section: str, settings: ApiConfig) -> list[str]:
    """Mistakes in the settings of one role, each a sentence; a key is never repeated."""
    name, url = settings.api_key_env, settings.base_url
    parts = _split(url or "http://unset")
    problems = [sentence] if name and (sentence := key_in_place_of_name(section, name)) else []
    if "@" in parts.netloc or parts.query:
        problems.append(
            f"{section}.base_url holds a user or a query, which would be written into files; leave it "
            f"out, and name the variable of a key in {section}.api_key_env"
        )
    elif url and (not _is_address(parts) or re.search(r"[\s#]", url)):
        problems.append(
            f"{section}.base_url={url} must begin with http:// or https:// and name a host; "
            "a port is a number, and blanks and # are no part of it"
        )
    problems += [
        f"{section}.extra_body.{key} cannot be set; requests have this field already, from other settings"
        for key in settings.extra_body
        if key in OWN_FIELDS
    ]
    if secret := next(_secret_fields(settings.extra_body), None):
        problems.append(
            f"{section}.extra_body.{secret} holds a key, which would be written into files; name the "
            f"variable of a key in {section}.api_key_env"
        )
    return problems


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that cannot be
        return SplitResult("", url.partition("//")[2], "", "", "")


def _is_address(parts: SplitResult) -> bool:
    try:
        host = (parts.hostname or "").encode("idna")
        return parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and b" " not in host
    except ValueError:
        return False


def _secret_fields(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of fields that hold secrets, by their names or values."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _secret_fields(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (_SECRET_NAME.fullmatch(name) or _SECRET_VALUE.match(value)):
            yield prefix + name


def key_in_place_of_name(section: str, name: str) -> str | None:
    """The sentence for a key that is given as `api_key_env`, without it; None for a name of a variable."""
    mixed = re.search(r"\d", name) and re.search(r"[a-z]", name)
    looks_like_one = bool(_KEY.match(name) or (mixed and len(name) >= 20))
    if name in os.environ or (re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and not looks_like_one):
        return None
    return (
        f"{section}.api_key_env takes the name of an environment variable that holds the key, never the key "
        "itself: export the key, and name its variable"
    )
