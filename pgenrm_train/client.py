"""Client of the scoring service, and reward functions for trainers.  Needs httpx and nothing else.

    reward = PersonalReward("http://127.0.0.1:8000")
    reward.score(user_id="ann", query="Fix my report?", responses=["Short.", "Long."]).scores

| trainer | |
|---|---|
| verl | `reward.custom_reward_function.path=…/client.py name=compute_score`, `reward_kwargs.url=…` |
| TRL | `reward_funcs=trl_reward(url)`, or `trl_reward_async(url)` |
| OpenRLHF | `reward_func = openrlhf_reward(url)` in the file of `--reward.remote_url` |

Responses to one prompt are scored as one group.  So the reward functions gather the rollouts of a prompt and
send them once.  A response without a score is None or NaN if the trainer accepts that, else ScoringError.
"""

import asyncio
import functools
import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

RETRIED = (429, 503)
MAX_WAIT_SECONDS = 30.0
PARALLEL = 32  # requests of one call at the same time
Json = Mapping[str, object]
Result = TypeVar("Result")


class ScoringError(Exception):
    """No score: `kind` is that of the service, or `connection`; `status` is None without an answer."""

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{message} ({kind})")
        self.kind, self.message, self.status = kind, message, status

    def __reduce__(self) -> tuple[type, tuple[str, str, int | None]]:
        return type(self), (self.kind, self.message, self.status)


@dataclass(frozen=True)
class Scores:
    """The answer of `POST /v1/score`, per response in the order sent; None for a response without a score."""

    scores: list[float | None]
    verified: list[bool]
    probabilities: list[float | None]
    ranking: list[int]
    failures: list[dict[str, object]]
    usage: dict[str, int]
    model: str
    chains: list[dict[str, object]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PersonalReward:
    """A scoring service at `url`; safe to share between threads, and picklable.

    `timeout` is in seconds per try.  `attempts` are tries per call: 429, 503 and lost connections are tried
    again, with growing waits.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    attempts: int = 6

    def score(self, *, responses: Sequence[str], **request: object) -> Scores:
        """Score two or more responses.

        `request`: `user_id` or `history`, `query` or `messages`, and optionally `criteria`, `ind`, `pro`,
        `return_chains`.  Raises ScoringError.
        """
        return Scores(**self._call("POST", "/v1/score", {**request, "responses": list(responses)}))

    async def score_async(self, *, responses: Sequence[str], **request: object) -> Scores:
        """`score` without blocking the event loop."""
        return await _in_thread(lambda: self.score(responses=responses, **request))

    def rank(self, *, responses: Sequence[str], **request: object) -> list[int]:
        """Numbers of the responses, best first.  Raises ScoringError if one has no score."""
        scores = self.score(responses=responses, **request)
        if len(scores.ranking) < len(responses):
            raise ScoringError("no_score", f"of {len(responses)} responses {len(scores.ranking)} have scores")
        return scores.ranking

    def put_votes(self, user_id: str, votes: Sequence[Json]) -> None:
        """Replace the votes of a stored user."""
        self._call("PUT", _votes(user_id), {"votes": list(votes)})

    def add_votes(self, user_id: str, votes: Sequence[Json]) -> None:
        """Append votes of a stored user; not repeated after a lost answer, which may have been stored."""
        self._call("POST", _votes(user_id), {"votes": list(votes)}, repeatable=False)

    def delete_user(self, user_id: str) -> None:
        """Delete everything of a stored user."""
        self._call("DELETE", _votes(user_id), None)

    def _call(self, method: str, path: str, body: Json | None, *, repeatable: bool = True) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        for attempt in range(1, self.attempts + 1):
            try:
                answer = _http(os.getpid(), _is_here(self.url)).request(
                    method, self.url.rstrip("/") + path, json=body, headers=headers, timeout=self.timeout
                )
            except httpx.TransportError as error:
                failure = ScoringError("connection", f"{self.url} does not answer ({type(error).__name__})")
                wait = None
                if not (repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise failure from None
            except (httpx.InvalidURL, ValueError, ImportError) as error:  # of the address or a proxy
                raise ScoringError("client", f"{self.url} cannot be called: {error}") from None
            else:
                try:
                    if answer.is_success:
                        return dict(answer.json())
                except (ValueError, TypeError):
                    raise ScoringError(
                        "http", f"{self.url} is no scoring service", answer.status_code
                    ) from None
                failure, wait = _failure(answer), answer.headers.get("retry-after", "")
            if attempt == self.attempts or failure.status not in (None, *RETRIED):
                raise failure
            seconds = float(wait) if wait and re.fullmatch(r"\d+(\.\d+)?", wait) else 0.5
            time.sleep(min(MAX_WAIT_SECONDS, seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1)))
        raise AssertionError("attempts must be at least 1")


@functools.lru_cache(maxsize=2)
def _http(process: int, here: bool) -> httpx.Client:
    """The connections of a process; a forked child opens its own.

    This machine's own addresses are never called through a proxy of the environment.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=PARALLEL)
    # The environment also names certificates, which create_ssl_context reads.
    return httpx.Client(limits=limits, verify=httpx.create_ssl_context(), trust_env=not here)


def _is_here(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads for calls from event loops, whose default pool may be small."""
    return ThreadPoolExecutor(PARALLEL, "scoring")


async def _in_thread(call: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), call)


def _votes(user_id: str) -> str:
    return f"/v1/users/{quote(user_id, safe='')}/votes"


def _failure(answer: httpx.Response) -> ScoringError:
    try:
        error = answer.json()["error"]
        return ScoringError(error["kind"], error["message"], answer.status_code)
    except (ValueError, TypeError, LookupError):
        return ScoringError("http", f"the server answered {answer.status_code}", answer.status_code)


# ---- groups ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """One response with the user and question of its prompt, as fields of a request."""

    request: str  # JSON, so that equal prompts are equal
    response: str

    @classmethod
    def of(cls, user: object, question: Json, response: str) -> "Rollout":
        """`user`: an id, an object with `user_id` or `history`, or its JSON text.

        The object may also hold `query` or `messages`, which then replace those of `question`.
        """
        fields = _user(user)
        if not {"query", "messages"} & set(fields):
            fields = {**fields, **question}
        return cls(json.dumps(fields, sort_keys=True), response)


def _user(user: object) -> dict[str, object]:
    if isinstance(user, str) and user.lstrip().startswith("{"):
        try:
            user = json.loads(user)
        except ValueError:
            raise ScoringError("bad_request", "the user starts with { and is not JSON") from None
    return {"user_id": user} if isinstance(user, str) else dict(user)  # type: ignore[call-overload]


def score_rollouts(reward: PersonalReward, rollouts: Sequence[Rollout]) -> list[float | ScoringError]:
    """The score of every rollout, or the reason for none; the rollouts of a prompt are one request."""
    groups: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        groups.setdefault(rollout.request, []).append(place)
    results: list[float | ScoringError] = [ScoringError("no_score", "not scored")] * len(rollouts)

    def fill(group: tuple[str, list[int]]) -> None:
        request, places = group
        for place, result in zip(
            places, _score_group(reward, request, [rollouts[i].response for i in places])
        ):
            results[place] = result

    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(fill, groups.items()):
            pass
    return results


def _score_group(
    reward: PersonalReward, request: str, responses: Sequence[str]
) -> Sequence[float | ScoringError]:
    if len(responses) < 2:
        message = "the prompt has one rollout, and scores compare at least two"
        return [ScoringError("single_rollout", message)]
    try:
        scores = reward.score(responses=responses, **json.loads(request))
    except ScoringError as error:
        return [error] * len(responses)
    kinds = ", ".join(sorted({str(failure["kind"]) for failure in scores.failures}))
    return [ScoringError("no_score", kinds) if score is None else score for score in scores.scores]


# ---- verl --------------------------------------------------------------------------------------------------


class _Gatherer:
    """Gather the rollouts of one event loop; a group is sent when full, or a while after its last rollout."""

    def __init__(self) -> None:
        self._groups: dict[tuple[PersonalReward, str], list[tuple[str, asyncio.Future[float | ScoringError]]]]
        self._groups = {}
        self._timers: dict[tuple[PersonalReward, str], asyncio.TimerHandle] = {}
        self._sending: set[asyncio.Task[None]] = set()

    async def score(
        self, reward: PersonalReward, rollout: Rollout, group_size: int, seconds: float
    ) -> float | ScoringError:
        key, loop = (reward, rollout.request), asyncio.get_running_loop()
        answer: asyncio.Future[float | ScoringError] = loop.create_future()
        group = self._groups.setdefault(key, [])
        group.append((rollout.response, answer))
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if len(group) >= group_size:
            self._send(key)
        else:
            self._timers[key] = loop.call_later(seconds, self._send, key)
        return await answer

    def _send(self, key: tuple[PersonalReward, str]) -> None:
        self._timers.pop(key, None)
        task = asyncio.ensure_future(self._score(key, self._groups.pop(key)))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _score(
        self,
        key: tuple[PersonalReward, str],
        group: Sequence[tuple[str, "asyncio.Future[float | ScoringError]"]],
    ) -> None:
        results: Sequence[float | ScoringError]
        try:
            results = await _in_thread(lambda: _score_group(*key, [response for response, _ in group]))
        except Exception as error:  # else its rollouts would wait forever
            results = [ScoringError("client", f"{type(error).__name__}: {error}")] * len(group)
        for (_, answer), result in zip(group, results, strict=True):
            if not answer.done():
                answer.set_result(result)


_GATHERERS: dict[int, tuple[asyncio.AbstractEventLoop, _Gatherer]] = {}
_LOCK = threading.Lock()


def _gatherer() -> _Gatherer:
    loop = asyncio.get_running_loop()
    with _LOCK:
        if id(loop) not in _GATHERERS or _GATHERERS[id(loop)][0] is not loop:
            _GATHERERS[id(loop)] = loop, _Gatherer()
        return _GATHERERS[id(loop)][1]


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Json,
    *,
    url: str,
    group_size: int,
    api_key_env: str | None = None,
    gather_seconds: float = 10.0,
    on_failure: str = "error",
    ind: int | None = None,
    pro: int | None = None,
    **_: object,
) -> dict[str, float]:
    """verl's custom reward function; the keywords after `extra_info` are its `reward_kwargs`.

    `extra_info` holds `user_id` or `history`, and `query` or `messages`.  The rollouts of a prompt in one
    worker are one group: it is sent when `group_size` are there, or `gather_seconds` after the last.
    `on_failure`: error raises ScoringError, nan returns NaN.
    """
    reward = PersonalReward(url, os.environ[api_key_env] if api_key_env else None)
    names = ("user_id", "history", "criteria", "query", "messages")
    fields = {name: _plain(extra_info[name]) for name in names if extra_info.get(name) is not None}
    options = {name: value for name, value in (("ind", ind), ("pro", pro)) if value is not None}
    rollout = Rollout(json.dumps({**fields, **options}, sort_keys=True), solution_str)
    result = await _gatherer().score(reward, rollout, group_size, gather_seconds)
    return {"score": _number(result, on_failure)}


def _plain(value: object) -> object:
    """Arrays as lists, because data frames turn lists into arrays."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Iterable) else value


def _number(result: float | ScoringError, on_failure: str) -> float:
    if not isinstance(result, ScoringError):
        return result
    if on_failure == "nan":
        return math.nan
    raise result


# ---- TRL ---------------------------------------------------------------------------------------------------


def trl_reward(
    url: str, api_key: str | None = None, *, user_column: str = "user_id"
) -> Callable[..., list[float | None]]:
    """A reward function of TRL's trainers; None for a completion without a score.

    `user_column` of the data set holds the user: an id, an object with `user_id` or `history`, or its JSON.
    """
    return _named(functools.partial(_trl, PersonalReward(url, api_key), user_column))


def trl_reward_async(
    url: str, api_key: str | None = None, *, user_column: str = "user_id"
) -> Callable[..., Awaitable[list[float | None]]]:
    """`trl_reward` as a coroutine function, which TRL runs at the same time as others."""
    return _named(functools.partial(_trl_async, PersonalReward(url, api_key), user_column))


def _named(function: functools.partial) -> functools.partial:  # type: ignore[type-arg]
    function.__name__ = "personal_reward"  # type: ignore[attr-defined]  # TRL logs it under this name
    return function


def _trl(
    reward: PersonalReward,
    user_column: str,
    prompts: Sequence[object],
    completions: Sequence[object],
    **columns: Sequence[object],
) -> list[float | None]:
    rollouts = [
        Rollout.of(user, _question(prompt), _text(completion))
        for user, prompt, completion in zip(columns[user_column], prompts, completions, strict=True)
    ]
    return [None if isinstance(r, ScoringError) else r for r in score_rollouts(reward, rollouts)]


async def _trl_async(
    reward: PersonalReward, user_column: str, *arguments: Sequence[object], **columns: Sequence[object]
) -> list[float | None]:
    return await _in_thread(lambda: _trl(reward, user_column, *arguments, **columns))


def _question(prompt: object) -> Json:
    if isinstance(prompt, str):
        return {"query": prompt}
    turns = [turn for turn in prompt if isinstance(turn, Mapping)] if isinstance(prompt, Sequence) else []
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in turns]}


def _text(completion: object) -> str:
    """The text of a completion, which in conversations is a list of messages."""
    if isinstance(completion, str):
        return completion
    messages = [m for m in completion if isinstance(m, Mapping)] if isinstance(completion, Sequence) else []
    return "\n".join(str(message["content"]) for message in messages)


# ---- OpenRLHF ----------------------------------------------------------------------------------------------


def openrlhf_reward(
    url: str, api_key: str | None = None, *, on_failure: str = "error"
) -> Callable[..., dict[str, object]]:
    """The `reward_func` of an OpenRLHF reward file.

    A label is the user: an id, or the JSON of an object with `user_id` or `history`, and optionally `query`.
    """
    return functools.partial(_openrlhf, PersonalReward(url, api_key), on_failure)


def _without_prompt(query: str, prompt: str) -> str:
    """The response after the prompt, which may follow a special token."""
    _, found, response = query.partition(prompt) if prompt else ("", True, query)
    if not found:
        raise ScoringError("bad_request", "a query does not contain its prompt")
    return response


def _openrlhf(
    reward: PersonalReward,
    on_failure: str,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[str],
    **_: object,
) -> dict[str, object]:
    import torch  # of the trainer

    rollouts = [
        Rollout.of(label, {"query": prompt}, _without_prompt(query, prompt))
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    results = score_rollouts(reward, rollouts)
    rewards = torch.tensor([_number(result, on_failure) for result in results])
    missing = [float(isinstance(result, ScoringError)) for result in results]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"missing": torch.tensor(missing)}}
