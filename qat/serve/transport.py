"""The HTTP under the API: who may ask, bodies of limited size, streams that notice a hang-up."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qat.serve.errors import ApiError, draining
from qat.serve.generation import Generation
from qat.serve.metrics import Metrics

GENERATING = ("/v1/chat/completions", "/v1/completions")
"""Endpoints whose requests are waited for before the server stops."""
OPEN = ("/", "/health")
"""Paths that need no API key."""
LABELS = frozenset({*GENERATING, *OPEN, "/v1/models", "/metrics"})
"""Paths with a row of their own in the metrics."""
BODY_SECONDS = 30.0
"""Time for the body of a request to arrive."""
DISCARD_BYTES = 256 << 20
"""Of a refused body so much is read, so that the client sees the reply and not a reset."""
CLIENT_GONE = 499
"""Status under which requests are counted whose client hung up."""

Result = TypeVar("Result")


class Lifecycle:
    """Which requests are being answered, and whether new ones are taken."""

    def __init__(self) -> None:
        self.draining = False
        self._requests = 0
        self._generations: set[Generation] = set()
        self._changed = asyncio.Event()

    def enter(self) -> None:
        """A request is accepted."""
        self._requests += 1

    def leave(self) -> None:
        """It has been answered."""
        self._requests -= 1
        self._changed.set()

    def began(self, generation: Generation) -> None:
        """Its sequences are in the engine."""
        self._generations.add(generation)

    def ended(self, generation: Generation) -> None:
        """They are finished or given up."""
        generation.cancel()
        self._generations.discard(generation)

    async def drain(self, seconds: float) -> int:
        """Take nothing new and wait until all is answered; returns how many were cut off."""
        self.draining = True
        end = time.monotonic() + seconds
        while self._requests and (left := end - time.monotonic()) > 0:
            await self._wait(left)
        cut = self._requests
        for generation in self._generations:
            generation.cut_off()
        # the time for a last word to each of them
        end = time.monotonic() + 2.0
        while self._requests and (left := end - time.monotonic()) > 0:
            await self._wait(left)
        return cut

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)


class Gate:
    """ASGI middleware in front of every route: API key, drain, and the counts of requests."""

    def __init__(
        self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics, api_key: str | None
    ) -> None:
        self._app, self._lifecycle, self._metrics = app, lifecycle, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin = 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        waited_for = path in GENERATING
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _discard(receive)
                await error_response(refusal)(scope, receive, watched)
            elif waited_for:
                with self._metrics.in_flight.track_inprogress():
                    self._lifecycle.enter()
                    try:
                        await self._app(scope, receive, watched)
                    finally:
                        self._lifecycle.leave()
            else:
                await self._app(scope, receive, watched)
        finally:
            label = path if path in LABELS else "other"
            self._metrics.requests.labels(label, str(status)).inc()
            self._metrics.request_seconds.labels(label).observe(time.perf_counter() - begin)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] not in OPEN and not self._key_is_right(scope):
            return ApiError(
                401,
                "wrong or missing API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        if self._lifecycle.draining and scope["path"] in GENERATING:
            return draining()
        return None

    def _key_is_right(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        sent = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = sent.partition(b" ")
        # takes the same time wherever the keys differ
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"


def error_response(error: ApiError) -> Response:
    """The reply to a refused request."""
    headers = dict(error.headers)
    # uvicorn ends the connection behind a failure, which the client should know of
    if error.status in (413, 500, 503):
        headers["Connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request, at most `limit` bytes.

    Raises:
        ApiError: 415, another content type; 413, too large; 408, it takes too long to arrive.
        ClientGone: the client hung up.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a page of another site may send plain text without asking first, but not JSON
        await _discard(request.receive)
        raise ApiError(415, f"Content-Type: {kind or 'none'}; send application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in _body(request.receive):
                size += len(part)
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()  # read on, see `_discard`
                    if size > DISCARD_BYTES:
                        break
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout"
        ) from None
    if size > limit:
        raise ApiError(
            413, f"the body is larger than {limit} bytes (max_body_mib)", code="request_too_large"
        )
    return b"".join(parts)


class ClientGone(Exception):  # noqa: N818  (not an error: nobody waits for the answer)
    """The client hung up."""


async def _body(receive: Receive) -> AsyncGenerator[bytes, None]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _discard(receive: Receive) -> None:
    """Read a body that nobody wants; a client that gets a reply while it sends may miss it."""
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in _body(receive):
                size += len(part)
                if size > DISCARD_BYTES:
                    return
    except (TimeoutError, ClientGone):
        return


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientGone: the client hung up first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """A stream of server-sent events that ends its source when the client hangs up."""

    def __init__(self, source: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        """Args: close: called at the end in every case, even if `source` was never begun."""
        super().__init__()
        self._source, self._close = source, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await while_connected(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _send(self, send: Callable[[Message], Awaitable[None]]) -> None:
        async with aclosing(self._source) as source:
            async for data in source:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
