"""What the two generating endpoints share: read the body, parse it, answer whole or as server-sent events.

A failure before the first token has its HTTP status; one after it is an `error` event, and no [DONE] follows.
A client that goes away cancels its handler, which closes the session, which aborts the request on every worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from urllib.parse import quote

from aiohttp import HttpVersion11, hdrs, web

from tercet.errors import Cancelled, InvalidRequest, TercetError, UnsupportedMedia, as_named
from tercet.metrics import Asked
from tercet.roles.gateway.frontend import Frontend
from tercet.roles.gateway.http_server import CALLER, OBSERVED, REQUEST_ID
from tercet.roles.gateway.openai_reply import ChatReply, CompletionReply, Reply, error_event
from tercet.roles.gateway.openai_request import PARAMETERS, Origin, Parsed, parse_chat, parse_completion
from tercet.roles.gateway.session import Session
from tercet.wire.bodies import Bodies, Body, too_large
from tercet.wire.inflate import inflate

_Parse = Callable[[bytes, str | None, float, Origin], Parsed]

LAST_WORD_S = 1.0  # for telling a slow client why its stream ends
MOST_HELD = 1 << 18  # tokens and top logprobs of an answer that is not streamed
HEAVY = 2000  # tokens and logprobs: more than that are rendered in a thread
MOST_IGNORED = 1024  # characters of the header that names what was ignored
PLAIN = "identity"  # the encoding of a body that has none
_SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Generation:
    def __init__(self, frontend: Frontend, bodies: Bodies) -> None:
        self._frontend = frontend
        self._bodies = bodies
        self._metrics = frontend.metrics

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat, ChatReply)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion, CompletionReply)

    async def invite(self, request: web.Request) -> None:
        """Ask a client for its body that waits to be asked (Expect: 100-continue)."""
        if request.headers[hdrs.EXPECT].lower() != "100-continue":
            raise InvalidRequest("Expect: nothing but 100-continue is understood")
        self._check_head(request)
        if request.version < HttpVersion11:  # it knows no 100
            return
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun

    async def _generate(self, request: web.Request, parse: _Parse, kind: type[Reply]) -> web.StreamResponse:
        with self._metrics.request(kind.operation, request[CALLER].label) as asked:
            self._check_head(request)
            try:
                body = await self._bodies.receive(request.content.readany)
            except web.RequestPayloadError as error:
                raise InvalidRequest(f"the body cannot be read: {error}") from error
            try:
                parsed = await self._parsed(request, body, parse)
                self._frontend.check_model(parsed.model)
                if parsed.options.stream:
                    return await self._stream(request, body, parsed, kind, asked)
                return await self._whole(request, body, parsed, kind)
            finally:
                body.release()

    def _check_head(self, request: web.Request) -> None:
        """Raises UnsupportedMedia, BodyTooLarge, before the body is read."""
        declared = request.headers.get(hdrs.CONTENT_TYPE)
        media = (declared or "").partition(";")[0].strip().lower()
        # A web page may send undeclared bodies, text and forms to any origin; JSON only to one that allows it (CORS).
        unsaid = declared is None and hdrs.ORIGIN not in request.headers
        if not unsaid and media != "application/json" and not media.endswith("+json"):
            raise UnsupportedMedia(f"the body must be declared as application/json, not {media[:60] or 'undeclared'}")
        if (request.content_length or 0) > self._bodies.limits.max_bytes:
            raise too_large(self._bodies.limits.max_bytes)

    async def _parsed(self, request: web.Request, body: Body, parse: _Parse) -> Parsed:
        caller = request[CALLER]
        encoding = request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower() or PLAIN
        origin = Origin(request[REQUEST_ID], caller, request[OBSERVED].trace)
        work = partial(self._parse, parse, encoding, body.data, request.headers.get("X-Request-Timeout"), origin)
        size = body.size if encoding == PLAIN else self._bodies.limits.max_bytes
        return await self._frontend.offloop.parse(caller.client, size, work)

    def _parse(self, parse: _Parse, encoding: str, data: bytes, timeout: str | None, origin: Origin) -> Parsed:
        if encoding != PLAIN:
            data = inflate(encoding, data, self._bodies.limits.max_bytes)
        return parse(data, timeout, self._frontend.limits.request_timeout_s, origin)

    def _reply(self, kind: type[Reply], parsed: Parsed, session: Session) -> Reply:
        model = self._frontend.model
        return kind(session, model.name, model.tokenizer, parsed.options)

    async def _whole(self, request: web.Request, body: Body, parsed: Parsed, kind: type[Reply]) -> web.Response:
        held, deltas = 0, []
        async with self._frontend.session(parsed.ask) as session, aclosing(session.deltas()) as stream:
            request[OBSERVED].begun(session)
            body.release()
            async for delta in stream:
                deltas.append(delta)
                held += sum(1 + len(token.top_logprobs) for token in delta.tokens)
                if held > MOST_HELD:
                    raise InvalidRequest(f"the answer has more than {MOST_HELD} tokens and logprobs; use stream: true")
            reply = self._reply(kind, parsed, session)
            weight = held + sum(reply.weight(choice.index) for choice in session.choices)
            content = await self._rendered(weight, parsed, partial(reply.body, deltas))
        return web.Response(body=content, content_type="application/json", headers=_headers(parsed))

    async def _rendered(self, weight: int, parsed: Parsed, render: Callable[[], bytes]) -> bytes:
        if weight <= HEAVY:
            return render()
        return await self._frontend.offloop.render(parsed.ask.client, render)

    async def _stream(
        self, request: web.Request, body: Body, parsed: Parsed, kind: type[Reply], asked: Asked
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE | _headers(parsed))
        try:
            await self._write_deltas(request, response, body, parsed, kind)
        except ConnectionResetError as error:
            raise Cancelled("the client has closed the connection") from error
        except Exception as error:  # a boundary: the status has been sent, so any error must be told here
            if not response.prepared:
                raise
            named = as_named(error, request[REQUEST_ID])
            asked.error = type(named)
            self._metrics.failed(asked.error)
            request[OBSERVED].error = named
            await self._last_word(request, response, named)
        return response

    async def _write_deltas(
        self, request: web.Request, response: web.StreamResponse, body: Body, parsed: Parsed, kind: type[Reply]
    ) -> None:
        async with self._frontend.session(parsed.ask) as session, aclosing(session.deltas()) as deltas:
            request[OBSERVED].begun(session)
            body.release()
            reply = self._reply(kind, parsed, session)
            repeats_prompt = reply.repeats_prompt
            async for delta in deltas:
                if not response.prepared:  # not before the first token: a failure until then has its own status
                    await response.prepare(request)
                if repeats_prompt and (weight := reply.weight(delta.index)):
                    await response.write(await self._rendered(weight, parsed, partial(reply.chunk, delta)))
                else:
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


def _headers(parsed: Parsed) -> dict[str, str]:
    headers = {"X-Request-Id": parsed.ask.request_id}
    if parsed.ignored:
        headers["X-Ignored-Parameters"] = ", ".join(map(quote, parsed.ignored))[:MOST_IGNORED]
    return headers
