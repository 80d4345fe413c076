"""The OpenAI-compatible HTTP API over an engine.

``POST /v1/chat/completions``, ``POST /v1/completions`` (whole or streamed), ``GET /v1/models``,
``/health``, ``/metrics`` and the chat page at ``/``. With an API key, all but the page and
``/health`` ask for it. Errors have OpenAI's shape, see `qat.serve.errors`.
"""

import base64
import hashlib
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.resources import files

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from qat.serve.errors import ApiError
from qat.serve.generation import Generation, Shown
from qat.serve.protocol import ChatRequest, CompletionRequest, parse
from qat.serve.replies import DONE, ChatReply, CompletionReply, Reply, event
from qat.serve.service import Service
from qat.serve.transport import (
    CLIENT_GONE,
    ClientGone,
    EventStream,
    Gate,
    error_response,
    read_body,
    while_connected,
)

log = logging.getLogger(__name__)

COMPLETION_TOKENS = 16
"""``max_tokens`` of ``/v1/completions`` when it is left out, as in OpenAI's API."""


def create_app(service: Service) -> FastAPI:
    """The ASGI application."""
    # the pages of documentation would load scripts from elsewhere
    app = FastAPI(title="qat serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    _add_generation(app, service)
    _add_models(app, service)
    _add_state(app, service)
    _add_errors(app)
    app.add_middleware(
        Gate,
        lifecycle=service.lifecycle,
        metrics=service.metrics,
        api_key=service.settings.api_key,
    )
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    settings, prompts = service.settings, service.prompts

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatRequest, await read_body(request, settings.max_body_bytes))
        model = service.model_name(body.model)
        service.check_count(body.n or 1)
        prompt = await prompts.of_chat(body.messages)
        generation = service.start(body, model, [prompt], None)
        reply = ChatReply(model, settings.fingerprint, body.logprobs is True, body.include_usage)
        return await _answer(request, service, generation, reply, body.n or 1, bool(body.stream))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await read_body(request, settings.max_body_bytes))
        model = service.model_name(body.model)
        n = body.n or 1
        service.check_count(len(body.prompt) * n)
        read = [
            await prompts.of_text(prompt)
            if isinstance(prompt, str)
            else prompts.of_ids(prompt, echo=body.echo is True)
            for prompt in body.prompt
        ]
        generation = service.start(body, model, read, COMPLETION_TOKENS)
        echoes = [prompt.text for prompt in read for _ in range(n)] if body.echo else None
        reply = CompletionReply(
            model, settings.fingerprint, body.logprobs is not None, body.include_usage, echoes
        )
        count = len(read) * n
        return await _answer(request, service, generation, reply, count, bool(body.stream))


async def _answer(
    request: Request,
    service: Service,
    generation: Generation,
    reply: Reply,
    count: int,
    stream: bool,
) -> Response:
    """The reply with all answers, whole or as a stream; ends the generation when it is over."""
    if stream:
        source = _events(generation, reply, count)
        return EventStream(source, lambda: service.lifecycle.ended(generation))
    try:
        pieces = await while_connected(request.receive, _collect(generation))
    finally:
        service.lifecycle.ended(generation)
    return JSONResponse(reply.whole(pieces, generation.usage))


async def _collect(generation: Generation) -> list[Shown]:
    async with aclosing(generation.pieces()) as pieces:
        return [shown async for shown in pieces]


async def _events(generation: Generation, reply: Reply, count: int) -> AsyncGenerator[bytes, None]:
    """The server-sent events of an answer; an error in mid-stream is one of them."""
    for chunk in reply.opening(count):
        yield event(chunk)
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for shown in pieces:
                for chunk in reply.chunks(shown):
                    yield event(chunk)
    except ApiError as error:
        log.error("a stream ended early: %s", error.message)
        yield event(error.body())
    else:
        if reply.include_usage:
            yield event(reply.usage_chunk(generation.usage))
    yield DONE


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        cards = [service.model_card(name) for name in service.engine.models]
        return JSONResponse({"object": "list", "data": cards})

    # names may hold slashes
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.model_card(service.model_name(name)))


def _add_state(app: FastAPI, service: Service) -> None:
    page = (files("qat.serve") / "page.html").read_text("utf-8")
    headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        if service.engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": service.engine.failure}, 503)
        if service.lifecycle.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _policy(page: str) -> str:
    """Content-Security-Policy under which only the page's own script and style run."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        reply = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        reply.headers |= error.headers or {}
        return error_response(reply)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # uvicorn logs the traceback
        return error_response(ApiError(500, "the server failed; its log says why"))
