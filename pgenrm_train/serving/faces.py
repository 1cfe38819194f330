"""Faces: routes in the formats of trainers, for their own clients.

| route | request → answer |
|---|---|
| `POST /v1/chat/completions` | OpenAI: chat messages that our client wrote → chains |
| `POST /openrlhf` | `{query, prompts, labels}` → `{rewards, scores, extra_logs}` |
| `POST /slime` | `{prompt, response, label}` → a number |
| `POST /score` | `{response_text, query, profile}` → `{score}` |
| `POST /compare` | NeMo-Gym: `{conversation_history, response_objs, principle}` → `{rewards, …}` |

The user is in `labels`, `label`, `profile` or `principle`: the id of a stored user, or an object (or its
JSON) with `user_id` or `history`.  The object may hold `criteria`, and `query` or `messages` instead of the
prompt.  Routes for a single response return its calibrated probability.  A failure is an error, or NaN under
`serve.on_failure=nan`.
"""

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from starlette.responses import Response

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.prompts.messages import INSTRUCTIONS, OPEN_INSTRUCTIONS, neutralise, split_prompt
from pgenrm_train.serving.cached_engine import Prompt
from pgenrm_train.serving.errors import Refused, bad_request
from pgenrm_train.serving.scoring import Task
from pgenrm_train.serving.service import RETRY_SECONDS, Service, Single
from pgenrm_train.serving.wire import QueryOrMessages, Strict, Text, Turn, User, check_limits

Label = str | dict[str, Any]
ChatPrompt = Text | list[Turn]


class LabelledUser(User):
    """The user in a label; a question in the label replaces that of the prompt."""

    query: Text | None = None
    messages: list[Turn] | None = None


class Chat(Strict):
    model: str = ""
    messages: Annotated[list[Turn], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=256)] = 1
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False


class OpenRlhf(BaseModel):
    query: list[Text]
    prompts: list[Text]
    labels: list[Label]


class Slime(BaseModel):
    prompt: ChatPrompt
    response: Text
    label: Label


class PlainScore(BaseModel):
    response_text: Text
    query: Text
    profile: Label


class Compare(BaseModel):
    conversation_history: Annotated[list[Turn], Field(min_length=1)]
    response_objs: Annotated[list[dict[str, Any]], Field(min_length=2)]
    principle: str | None = None


def add_faces(app: FastAPI, service: Service) -> None:
    """Add the routes of all faces."""
    _add_chat(app, service)

    @app.post("/openrlhf", tags=["trainers"], summary="OpenRLHF: --reward.remote_url")
    async def openrlhf(request: OpenRlhf) -> Response:
        if not len(request.query) == len(request.prompts) == len(request.labels) > 0:
            raise bad_request("query, prompts and labels: expected lists of one length above 0")
        rows = zip(request.query, request.prompts, request.labels, strict=True)
        tasks = [
            await _task(service, label, prompt, _without_prompt(query, prompt, n))
            for n, (query, prompt, label) in enumerate(rows)
        ]
        singles = await service.singles(tasks)
        rewards = [_number(service, single) for single in singles]
        return _json({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    @app.post("/slime", tags=["trainers"], summary="slime: rm_url")
    async def slime(request: Slime) -> Response:
        task = await _task(service, request.label, request.prompt, request.response)
        [single] = await service.singles([task])
        return _json(_number(service, single))

    @app.post("/score", tags=["trainers"], summary="A single response, as plain JSON")
    async def plain_score(request: PlainScore) -> Response:
        task = await _task(service, request.profile, request.query, request.response_text)
        [single] = await service.singles([task])
        return _json({"score": _number(service, single)})

    @app.post("/compare", tags=["trainers"], summary="NeMo-Gym: compare responses")
    async def compare(request: Compare) -> Response:
        return _json(await _compare(service, request))


# ---- single responses --------------------------------------------------------------------------------------


async def _task(service: Service, label: Label, prompt: ChatPrompt, response: str) -> Task:
    user, question = _labelled(label, prompt)
    texts = [*question.texts(), response, *(t for vote in user.history or () for t in vote.texts())]
    check_limits(iter(texts), 1, service.config.serve)
    return await service.task(user, question, [response])


def _without_prompt(query: str, prompt: str, number: int) -> str:
    """The response of OpenRLHF's query, which may start with a special token before the prompt."""
    _, found, response = query.partition(prompt) if prompt else ("", True, query)
    if not found:
        raise bad_request(f"query.{number}: expected a text that contains prompts.{number}")
    return response


def _labelled(label: Label, prompt: ChatPrompt) -> tuple[User, QueryOrMessages]:
    """The label's user, and the question of the label, else of the prompt."""
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except (ValueError, RecursionError):
            raise bad_request("the label starts with { and is not JSON") from None
    fields = {"user_id": label} if isinstance(label, str) else label
    try:
        user = LabelledUser.model_validate(fields)
        if user.query is not None or user.messages is not None:
            return user, QueryOrMessages(query=user.query, messages=user.messages)
        return user, QueryOrMessages(query=prompt) if isinstance(prompt, str) else QueryOrMessages(
            messages=prompt
        )
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "user"
        raise bad_request(f"label: {place}: {problem['msg'].removeprefix('Value error, ')}") from None


def _number(service: Service, single: Single) -> float:
    if single.probability is not None:
        return single.probability
    return _failure(service, single.failure or "")


def _failure(service: Service, kinds: str) -> float:
    """NaN under `serve.on_failure=nan`.  Else raises Refused: 503 (retry) if the engine failed, or 422."""
    if service.config.serve.on_failure == "nan":
        return math.nan
    if "engine:" in kinds:
        raise Refused(503, "engine_failed", f"a response has no score ({kinds})", RETRY_SECONDS)
    raise Refused(422, "no_score", f"a response has no score ({kinds})")


def _json(value: object) -> Response:
    """JSON with NaN, which Python's clients read."""
    return Response(json.dumps(value), media_type="application/json")


# ---- NeMo-Gym ----------------------------------------------------------------------------------------------


async def _compare(service: Service, request: Compare) -> dict[str, object]:
    if not request.principle:
        raise bad_request(
            "principle: expected the user, an id or the JSON of an object with user_id or history"
        )
    user, question = _labelled(request.principle, request.conversation_history)
    responses = [_output_text(item, n) for n, item in enumerate(request.response_objs)]
    texts = [*question.texts(), *responses, *(t for vote in user.history or () for t in vote.texts())]
    check_limits(iter(texts), len(responses), service.config.serve)
    task = await service.task(user, question, responses)
    scored = await service.run(task)
    answer = service.answer(task, scored)
    kinds = ", ".join(sorted({failure.kind for failure in answer.failures}))
    rewards = [_failure(service, kinds) if score is None else score for score in answer.scores]
    results = [
        {
            "response_i": chain.shown[0],
            "response_j": chain.shown[1],
            "judge_idx": chain.sample,
            "score_1": getattr(chain.chain, "scores", (None, None))[0],
            "score_2": getattr(chain.chain, "scores", (None, None))[1],
            "failure": chain.failure,
        }
        for chain in scored.chains
    ]
    failed = sum(scored.failures().values())
    metrics = {name: float(count) for name, count in answer.usage.model_dump().items()}
    return {
        "rewards": rewards,
        "comparison_results": results,
        "metrics": {**metrics, "failed_chains": float(failed)},
    }


def _output_text(response: Mapping[str, Any], number: int) -> str:
    """The text of an object of OpenAI's Responses API; its reasoning is left out."""
    texts = []
    try:
        for item in response["output"]:
            if item["type"] == "message":
                texts += [part["text"] for part in item["content"] if part["type"] == "output_text"]
    except (LookupError, TypeError):
        texts = []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise bad_request(f"response_objs.{number}: expected output with a message of type output_text")
    return "".join(texts)


# ---- OpenAI ------------------------------------------------------------------------------------------------


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions", tags=["trainers"], summary="OpenAI: chains for a prompt of this package"
    )
    async def chat(request: Chat) -> dict[str, object]:
        _check_chat(service, request)
        temperature = request.temperature
        temperature = service.config.eval.temperature if temperature is None else temperature
        messages = [_safe(turn, service.scorer.reserved) for turn in request.messages]
        # The engine adds the sample's number to the seed, and fails as a whole for one above 64 bits.
        seed = request.seed % 2**31
        prompt = Prompt(GenerationRequest("", tuple(messages), request.n, seed))
        samples = await service.generate(prompt, temperature)
        return _completion(service.config.model.label, samples, await service.scorer.prompt_tokens(messages))


def _check_chat(service: Service, request: Chat) -> None:
    longest = service.config.model.max_response_tokens
    limits = [n for n in (request.max_tokens, request.max_completion_tokens) if n is not None]
    if request.stream:
        raise bad_request("stream: chains are sent complete; use stream=false")
    if limits and min(limits) < longest:
        raise bad_request(f"max_tokens: expected at least {longest}, the length that a chain may have")
    check_limits((turn.content for turn in request.messages), 0, service.config.serve)
    last = request.messages[-1]
    if last.role != "user" or not last.content.startswith("<history>"):
        raise bad_request("messages: expected a prompt as pgenrm_train.prompts.messages writes it")


def _safe(turn: Turn, reserved: Sequence[str]) -> dict[str, str]:
    """A message of our layout, with the tokenizer's special tokens made harmless."""
    if turn.role == "user":
        sections = split_prompt(turn.content)
        # An empty section ends its line at the tag.
        text = "\n".join(tag + neutralise(section, reserved) for tag, section in sections)
        return {"role": "user", "content": text}
    known = turn.role == "system" and turn.content in (INSTRUCTIONS, OPEN_INSTRUCTIONS)
    return {"role": turn.role, "content": turn.content if known else neutralise(turn.content, reserved)}


def _completion(model: str, samples: Sequence[Generation], prompt: int) -> dict[str, object]:
    for sample in samples:
        if sample.text is None:
            raise Refused(422, sample.failure or "no_text", f"the model wrote no chain ({sample.failure})")
    tokens = sum(sample.tokens for sample in samples)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": sample.sample,
                "message": {"role": "assistant", "content": sample.text},
                "finish_reason": sample.failure or "stop",
            }
            for sample in samples
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        },
    }
