"""The OpenAI endpoint by aiohttp.

    POST /v1/chat/completions  /v1/completions     GET /v1/models  /health  /ready  /metrics

A failure before the first token has its HTTP status; one after it is an `error` event, and no [DONE] follows.
A client that goes away cancels its handler, which closes the session, which aborts the request on every worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from aiohttp import web

from tercet.errors import BodyTooLarge, Cancelled, TercetError
from tercet.metrics import CONTENT_TYPE
from tercet.roles.gateway.ask import Backend
from tercet.roles.gateway.frontend import Frontend
from tercet.roles.gateway.openai_reply import ChatReply, CompletionReply, Reply, error_body, error_event
from tercet.roles.gateway.openai_request import PARAMETERS, Parsed, parse_chat, parse_completion
from tercet.roles.gateway.readiness import Readiness

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Parse = Callable[[bytes, str | None, float], Parsed]

RETRY_AFTER_S = "1"  # with every 503
LAST_WORD_S = 1.0  # for telling a slow client why its stream ends
_SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class HttpApi:
    """The routes and what they need."""

    def __init__(self, frontend: Frontend, backend: Backend, readiness: Readiness) -> None:
        self._frontend = frontend
        self._backend = backend
        self._readiness = readiness
        self._metrics = frontend.metrics
        self._started = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._errors], client_max_size=self._frontend.limits.max_body_bytes)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._exposition)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat, ChatReply)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion, CompletionReply)

    async def _generate(self, request: web.Request, parse: _Parse, reply: type[Reply]) -> web.StreamResponse:
        body = await self._read(request)
        parsed = parse(body, request.headers.get("X-Request-Timeout"), self._frontend.limits.request_timeout_s)
        self._frontend.check_model(parsed.model)
        if parsed.options.stream:
            return await self._stream(request, parsed, reply)
        return await self._whole(parsed, reply)

    async def _read(self, request: web.Request) -> bytes:
        """Raises BodyTooLarge, before reading if the length is announced."""
        limit = self._frontend.limits.max_body_bytes
        too_large = BodyTooLarge(f"the body is larger than {limit} bytes (limits.max_body_bytes)")
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large from error

    async def _whole(self, parsed: Parsed, kind: type[Reply]) -> web.Response:
        model = self._frontend.model
        async with self._frontend.session(parsed.ask) as session, aclosing(session.deltas()) as deltas:
            reply = kind(session, model.name, model.tokenizer, parsed.options)
            body = reply.body([delta async for delta in deltas])
        return web.Response(body=body, content_type="application/json", headers=_id(parsed))

    async def _stream(self, request: web.Request, parsed: Parsed, kind: type[Reply]) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE | _id(parsed))
        try:
            await self._write_deltas(request, response, parsed, kind)
        except ConnectionResetError as error:
            raise Cancelled("the client has closed the connection") from error
        except TercetError as error:
            if not response.prepared:
                raise
            self._metrics.failed(type(error))
            await self._last_word(request, response, error)
        return response

    async def _write_deltas(
        self, request: web.Request, response: web.StreamResponse, parsed: Parsed, kind: type[Reply]
    ) -> None:
        model = self._frontend.model
        async with self._frontend.session(parsed.ask) as session, aclosing(session.deltas()) as deltas:
            reply = kind(session, model.name, model.tokenizer, parsed.options)
            async for delta in deltas:
                if not response.prepared:  # not before the first token: a failure until then has its own status
                    await response.prepare(request)
                await response.write(reply.chunk(delta))
                self._metrics.gateway_token.observe(time.monotonic() - delta.received)
        await response.write_eof()

    async def _last_word(self, request: web.Request, response: web.StreamResponse, error: TercetError) -> None:
        """Say why the stream ends; a client that does not read loses its connection."""
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await response.write(error_event(error, PARAMETERS))
                await response.write_eof()
        except (TimeoutError, ConnectionResetError):
            if request.transport is not None:
                request.transport.abort()

    async def _models(self, request: web.Request) -> web.Response:
        model = self._frontend.model
        entry = {"id": model.name, "object": "model", "created": self._started, "owned_by": "tercet"}
        return web.json_response({"object": "list", "data": [entry | {"max_model_len": model.max_context}]})

    async def _health(self, request: web.Request) -> web.Response:
        """200 while every role has a live worker and new requests are taken."""
        missing = ", ".join(self._backend.missing_roles())
        fault = self._readiness.closed or (f"no live worker of role {missing}" if missing else "")
        return _state(not fault, fault)

    async def _ready(self, request: web.Request) -> web.Response:
        """200 once a real request has passed through a live pair, and while one such pair lives."""
        return _state(self._readiness.ready, self._readiness.reason)

    async def _exposition(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every failure in the OpenAI shape, counted by its code."""
        try:
            return await handler(request)
        except TercetError as error:
            self._metrics.failed(type(error))
            headers = {"Retry-After": RETRY_AFTER_S} if error.http_status == 503 else None
            return web.json_response(error_body(error, PARAMETERS), status=error.http_status, headers=headers)
        except asyncio.CancelledError:
            self._metrics.failed(Cancelled)
            raise
        except web.HTTPException as error:
            shape = {"message": f"{error.reason}: {request.method} {request.path}", "type": "invalid_request_error"}
            body = {"error": shape | {"code": "invalid_request", "param": None}}
            return web.json_response(body, status=error.status)


def _id(parsed: Parsed) -> dict[str, str]:
    return {"X-Request-Id": parsed.ask.request_id}


def _state(good: bool, reason: str) -> web.Response:
    if good:
        return web.json_response({"status": "ok"})
    return web.json_response({"status": "unavailable", "reason": reason}, status=503)
