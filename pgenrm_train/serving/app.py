"""The HTTP app of the service: its own routes, and errors as {"error": {"kind", "message"}}.

| route | |
|---|---|
| `POST /v1/score` | scores of two or more responses |
| `PUT`, `POST`, `GET`, `DELETE /v1/users/{id}/votes` | replace, append, list, delete all of a user |
| `GET /v1/models`, `/health`, `/ready`, `/metrics` | |

`faces` adds routes in the formats of trainers.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pgenrm_train import __version__
from pgenrm_train.serving.errors import Failure, Refused, bad_request
from pgenrm_train.serving.faces import add_faces
from pgenrm_train.serving.guard import LOG, Guard, as_json
from pgenrm_train.serving.service import RETRY_SECONDS, Service
from pgenrm_train.serving.wire import ScoreAnswer, ScoreRequest, Vote, Votes, as_user_id

ABOUT = "Scores of responses for one user, from a model that reads the user's votes (docs/serving.md)."
VOTES = "/v1/users/{user_id:path}/votes"  # ids may hold slashes
Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]


def _path_id(text: str) -> str:
    if "\ufffd" in text:  # bytes that are no UTF-8 all become this character: several users would be one
        raise ValueError("expected a user's id in UTF-8")
    return as_user_id(text)


UserPath = Annotated[str, Path(min_length=1, max_length=256), AfterValidator(_path_id)]


def make_app(service: Service, key: str | None = None) -> FastAPI:
    """The app of a service; requests must carry `key` unless it is None."""
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure, "description": meaning} for status, meaning in _FAILURES.items()
    }
    app = FastAPI(title="pgenrm-train", version=__version__, description=ABOUT, responses=failures)
    app.add_middleware(Guard, settings=service.config.serve, metrics=service.metrics, key=key)
    for error, explain in _ERRORS.items():
        app.add_exception_handler(error, _handler(explain))
    _add_health(app, service)
    _add_users(app, service)

    @app.post("/v1/score", tags=["scores"], summary="Score two or more responses for a user")
    async def score(request: ScoreRequest) -> ScoreAnswer:
        return await service.score(request)

    @app.get("/v1/models", tags=["scores"], summary="The model and its calibration")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [service.model()]}

    add_faces(app, service)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["operation"], summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"], summary="Whether engine and store work")
    async def ready() -> dict[str, str]:
        await service.check()
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"], summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_users(app: FastAPI, service: Service) -> None:
    @app.put(VOTES, tags=["users"], summary="Replace a user's votes")
    async def replace(user_id: UserPath, votes: Votes) -> dict[str, int]:
        await service.add(user_id, votes.votes, replace=True)
        return {"stored": len(votes.votes)}

    @app.post(VOTES, tags=["users"], summary="Append votes of a user")
    async def append(user_id: UserPath, votes: Votes) -> dict[str, int]:
        await service.add(user_id, votes.votes, replace=False)
        return {"stored": len(votes.votes)}

    @app.get(VOTES, tags=["users"], summary="A user's votes, oldest first")
    async def votes(user_id: UserPath) -> Votes:
        return Votes(votes=[Vote.of(pair) for pair in await service.votes(user_id)])

    @app.delete(VOTES, tags=["users"], summary="Delete everything of a user")
    async def delete(user_id: UserPath) -> dict[str, int]:
        return {"deleted": await service.delete(user_id)}


def _handler(explain: Callable[[Exception], Refused]) -> Handler:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_json(explain(error))

    return handle


def _refused(error: Exception) -> Refused:
    assert isinstance(error, Refused)
    return error


def _invalid(error: Exception) -> Refused:
    """The first problem of a body, with its place and without its value."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return bad_request(f"the body is no JSON ({problem['ctx']['error']})")
    if problem["loc"] == ("body",):
        return bad_request("expected a JSON object as body, with the header content-type: application/json")
    place = ".".join(str(part) for part in problem["loc"][1:])
    text = problem["msg"].removeprefix("Value error, ")
    return bad_request(f"{place}: {text}" if place else text)


def _http(error: Exception) -> Refused:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Refused):  # FastAPI wraps what is raised while it reads a body
        return error.__cause__
    kind, message = _REFUSALS.get(error.status_code, ("bad_request", str(error.detail)))
    return Refused(error.status_code, kind, message)


def _store(error: Exception) -> Refused:
    # Only the type: its text holds parameters, so users' texts.
    LOG.error("store: %s", type(error).__name__)
    return Refused(503, "store", "the store of users does not answer", RETRY_SECONDS)


_FAILURES: dict[int | str, str] = {
    422: "a request that is refused; the message has the reason",
    "4XX": "another request that is refused",
    "5XX": "a failure of the service; with Retry-After if a retry can help",
}
_REFUSALS = {
    400: ("bad_request", "the body is no JSON in UTF-8, or too deep"),
    404: ("not_found", "no route has this path; /docs lists all"),
    405: ("method_not_allowed", "the route has other methods; /docs lists them"),
}
_ERRORS: dict[type[Exception], Callable[[Exception], Refused]] = {
    Refused: _refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    SQLAlchemyError: _store,
}
