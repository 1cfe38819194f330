"""ASGI middleware: check key, body and open requests; write logs and metrics.

A scoring request ends when its client disconnects, so its chains leave the engine.  A log line is a JSON
object with route, status and time, without texts and users.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from base64 import b64decode
from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgenrm_train.config import ServeConfig
from pgenrm_train.serving.errors import Refused
from pgenrm_train.serving.metrics import Metrics

LOG = logging.getLogger("pgenrm_train.serving")
OPEN = ("/health", "/ready")  # without a key
BODY_SECONDS = 60.0  # for a client to send its body
GONE = 499  # status in log and metrics of a request whose client disconnected
REQUEST_ID = re.compile(rb"[\w.-]{1,64}")


class _Disconnected(Exception):
    """The client has left before the answer."""


class Guard:
    """The wrapped app; `key` is None if requests need none."""

    def __init__(self, app: ASGIApp, settings: ServeConfig, metrics: Metrics, key: str | None) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = key.encode() if key is not None else None
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status, start = 500, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._guarded(scope, headers, receive, answer)
        except Refused as refused:  # before the app, or while it read the body
            await as_json(refused)(scope, receive, answer)
        except _Disconnected:
            status = GONE
        except Exception as error:
            # Type and frames only: its text may hold users' texts.
            frames = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("%s: %s\n%s", request_id, type(error).__name__, frames)
            failed = Refused(500, "internal", f"the service failed ({type(error).__name__})")
            await as_json(failed)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - start
            # The template of the path: the path itself holds the user.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            facts = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            LOG.info(json.dumps({**facts, "seconds": round(seconds, 4)}))

    async def _guarded(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        path = scope["path"]
        if path not in OPEN and not self._has_key(headers.get(b"authorization", b"")):
            raise Refused(401, "wrong_key", "the request needs the header Authorization: Bearer KEY")
        scores = scope["method"] == "POST" and not path.startswith("/v1/users/")
        if scores and self._open >= self._settings.max_waiting:
            raise Refused(429, "too_many_requests", f"{self._open} requests are open; try again later", 1)
        self._open += scores
        self._metrics.in_flight.set(self._open)
        limited = self._limited(headers, receive)
        try:
            if scores:
                await _until_disconnect(self._app, scope, limited, send)
            else:
                await self._app(scope, limited, send)
        finally:
            self._open -= scores
            self._metrics.in_flight.set(self._open)

    def _has_key(self, authorization: bytes) -> bool:
        """Whether the key is right, as bearer token or as password of basic authentication.

        Trainers that know only a URL send the latter for http://user:KEY@host.
        """
        if self._key is None:
            return True
        scheme, _, value = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                value = b64decode(value, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(value, self._key)

    def _limited(self, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        limit, read = self._settings.max_body_bytes, 0
        too_large = Refused(413, "body_too_large", f"the body is larger than {limit} bytes")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large

        end, complete = asyncio.get_running_loop().time() + BODY_SECONDS, False

        async def limited() -> Message:
            nonlocal read, complete
            try:
                async with asyncio.timeout_at(None if complete else end):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "timeout", f"the body took more than {BODY_SECONDS:g} s") from None
            complete = complete or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > limit:
                raise too_large
            return message

        return limited


async def _until_disconnect(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app, which receives its body only; the one message after it is the disconnection.

    Raises _Disconnected.
    """
    body_read = asyncio.Event()

    async def read() -> Message:
        message = await receive()
        if not message.get("more_body", False):
            body_read.set()
        return message

    async def disconnected() -> None:
        await body_read.wait()
        await receive()

    work = asyncio.ensure_future(app(scope, read, send))
    watch = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _Disconnected
        await work
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


def as_json(refused: Refused) -> JSONResponse:
    """The answer to a refused request."""
    headers = {} if refused.retry_after is None else {"retry-after": str(refused.retry_after)}
    if refused.status == 408:  # the rest of the body is not awaited
        headers["connection"] = "close"
    content = {"error": {"kind": refused.kind, "message": refused.message}}
    return JSONResponse(content, refused.status, headers)
