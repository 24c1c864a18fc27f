"""aiohttp's server behind the guard: which connections it serves, and how it answers errors outside handlers.

Every request passes `Boundary`, which lets nobody in whom `Door` refuses; what is no HTTP ends in
`HttpProtocol.handle_error`, a connection that is cut off in `HttpProtocol.farewell`. All three answer in the OpenAI
shape.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientConnectionResetError, StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from tercet.errors import (
    BodyTooLarge,
    Cancelled,
    HeadTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    TercetError,
    Unauthenticated,
    UnknownUrl,
    UriTooLong,
    as_named,
)
from tercet.metrics import CHAT, TEXT_COMPLETION
from tercet.roles.gateway.clients import Caller, Door, anybody
from tercet.roles.gateway.cors import Cors
from tercet.roles.gateway.observing import Observed, Observer
from tercet.roles.gateway.openai_reply import error_body
from tercet.roles.gateway.openai_request import PARAMETERS
from tercet.wire.connections import ConnectionPhase, Guard

RETRY_AFTER_S = 1.0  # with every 503
REQUEST_ID = web.RequestKey("request_id", str)
CALLER = web.RequestKey("caller", Caller)
OPEN = ("/health", "/ready")  # to everybody: probes have no key
PAGE = "/dashboard"  # where a browser asks its user for the key
OBSERVED = web.RequestKey("observed", Observed)
UNKNOWN = "unknown"  # in the log, for a method or a path that is none of ours
OPERATIONS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT_COMPLETION}
LINGER_S = 2.0  # an unwanted body is read for so long, so that its sender sees the answer
MOST_FRAMING = 64 * 1024  # bytes around a body's own: chunk sizes, their extensions, trailers
FRAMING = 0.5  # and so many more for each byte of it; chunks of 12 bytes need less
NO_LOG: Any = None  # aiohttp takes None, and then writes no access log
TOO_MANY_HEADERS = "Too many headers"  # aiohttp has no class for it

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_Count = Callable[[type[TercetError]], None]


async def hide_server(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """An aiohttp signal. The header tells everybody the versions of aiohttp and Python."""
    response.headers.popall(hdrs.SERVER, None)


class _Failure(web.Response):
    async def _prepare_headers(self) -> None:
        """aiohttp sends no signal for what it has not routed."""
        await super()._prepare_headers()
        self.headers.popall(hdrs.SERVER, None)


class HttpProtocol(web.RequestHandler):
    """One connection."""

    __slots__ = ("_body", "_came", "_count", "guard")
    opens = ConnectionPhase.IDLE
    at_first = 4096  # most requests are not larger

    def __init__(self, server: web.Server, guard: Guard, count: _Count) -> None:
        loop = asyncio.get_running_loop()
        # auto_decompress: bodies are inflated with a bound, by name.
        super().__init__(server, loop=loop, access_log=NO_LOG, lingering_time=LINGER_S, auto_decompress=False)
        self.guard = guard
        self._count = count
        self._body: StreamReader | None = None  # of a request that has no answer yet
        self._came = 0  # bytes of it so far, with its framing

    @contextmanager
    def receiving(self, body: StreamReader) -> Iterator[None]:
        """Watch how a body is framed. Within it nothing is answered before the whole body has come."""
        self._body, self._came = body, 0
        try:
            yield
        finally:
            self._body = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._body is None or self._body.is_eof():
            return
        self._came += len(data)
        if self._came > MOST_FRAMING + (1 + FRAMING) * self._body.total_bytes:
            self._body = None
            self.guard.cut("small_chunks", InvalidRequest("the body comes in too many too small chunks"))

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The bytes were not an HTTP request, or its answer could not be sent."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        request_id = uuid.uuid4().hex
        if isinstance(exc, HttpProcessingError):
            error = _of_parser(exc)
        else:
            error = as_named(exc if isinstance(exc, Exception) else RuntimeError(message), request_id)
        self._count(type(error))
        response = failure(error, request_id)
        response.force_close()
        return response

    def farewell(self, error: TercetError | None) -> bytes:
        if error is None:
            return b""
        self._count(type(error))
        body = json.dumps(error_body(error, PARAMETERS)).encode()
        headers = {"Content-Type": "application/json"} | _retry(error)
        headers |= {"Content-Length": str(len(body)), "Connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {error.http_status} {error.code()}\r\n{lines}\r\n"
        return head.encode() + body


class Boundary:
    """Wraps every request: marks it as served, gives it an id and a observed, and names, counts and answers each
    failure."""

    def __init__(
        self, handler: _Handler, router: web.UrlDispatcher, count: _Count, door: Door, cors: Cors, observer: Observer
    ) -> None:
        self._handler = handler
        self._router = router
        self._paths = frozenset(resource.canonical for resource in router.resources())
        self._count = count
        self._door = door
        self._cors = cors
        self._observer = observer

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        request[REQUEST_ID] = request_id = uuid.uuid4().hex
        refusal = self._let_in(request)
        operation = OPERATIONS.get(request.path, "") if request.method == "POST" and refusal is None else ""
        route, client = await self._route(request), request[CALLER].client
        with self._observer.open(route, request_id, client, operation, request.headers) as observed:
            request[OBSERVED] = observed
            response = await self._answer(request, refusal)
            observed.status = response.status
        return response

    async def _route(self, request: web.BaseRequest) -> str:
        """As the log tells it: nothing of it is as the client wrote it."""
        method = request.method if request.method in hdrs.METH_ALL else UNKNOWN
        if request.path in self._paths:
            return f"{method} {request.path}"
        assert isinstance(request, web.Request)
        resource = (await self._router.resolve(request)).route.resource
        return f"{method} {UNKNOWN if resource is None else resource.canonical}"

    async def _answer(self, request: web.BaseRequest, refusal: Unauthenticated | None) -> web.StreamResponse:
        protocol = request.protocol
        assert isinstance(protocol, HttpProtocol)
        try:
            with protocol.guard.serving(brief=request.method != "POST"), protocol.receiving(request.content):
                if refusal is not None:
                    raise refusal
                return await self._handler(request)
        except asyncio.CancelledError:
            self._count(Cancelled)
            raise
        except web.HTTPException as error:
            return self._failed(request, _of_router(error, request), _allowed(error))
        except ClientConnectionResetError:  # what aiohttp raises for a write to a client that has gone
            return self._failed(request, Cancelled("the client has gone"))
        except Unauthenticated as error:
            response = self._failed(request, error, {hdrs.WWW_AUTHENTICATE: _challenge(request)})
            await self._cors.on_prepare(request, response)  # which aiohttp calls for what it has routed only
            return response
        except Exception as error:  # noqa: BLE001  # a boundary: whatever it is, the client is told a name
            return self._failed(request, as_named(error, request[REQUEST_ID]))

    def _let_in(self, request: web.BaseRequest) -> Unauthenticated | None:
        """Say who calls. -> why it is not let in, before any of the body is read."""
        given, address = request.headers.get(hdrs.AUTHORIZATION, ""), request.remote or ""
        key = given.encode(errors="surrogateescape")
        request[CALLER] = anybody(key, address)
        if request.path in OPEN or _is_preflight(request):
            return None
        try:
            request[CALLER] = self._door.caller(key, address, from_page=_is_of_page(request))
        except Unauthenticated as error:
            return error
        return None

    def _failed(
        self, request: web.BaseRequest, error: TercetError, headers: Mapping[str, str] | None = None
    ) -> web.Response:
        self._count(type(error))
        request[OBSERVED].error = error
        return failure(error, request[REQUEST_ID], headers)


def failure(error: TercetError, request_id: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer to a request that failed."""
    return _Failure(
        text=json.dumps(error_body(error, PARAMETERS)),
        content_type="application/json",
        status=error.http_status,
        headers={"X-Request-Id": request_id, **_retry(error), **(headers or {})},
    )


def _retry(error: TercetError) -> dict[str, str]:
    after_s = RETRY_AFTER_S if error.http_status == Overloaded.http_status else error.retry_after_s
    return {} if after_s is None else {"Retry-After": str(math.ceil(after_s))}


def _is_preflight(request: web.BaseRequest) -> bool:
    """A browser sends it without the key, and gets no more than the names of what it may send."""
    return request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers


def _is_of_page(request: web.BaseRequest) -> bool:
    read = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    return read and (request.path == PAGE or request.path.startswith(f"{PAGE}/"))


def _challenge(request: web.BaseRequest) -> str:
    return 'Basic realm="tercet: an API key as the password", charset="UTF-8"' if _is_of_page(request) else "Bearer"


def _of_router(error: web.HTTPException, request: web.BaseRequest) -> TercetError:
    where = f"{request.method} {request.path[:200]}"
    if isinstance(error, web.HTTPNotFound):
        return UnknownUrl(f"there is no such URL here: {where}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"this URL takes {', '.join(sorted(error.allowed_methods))}, not {where}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(error.reason)
    return InvalidRequest(f"{error.reason}: {where}")


def _allowed(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


def _of_parser(error: HttpProcessingError) -> TercetError:
    if isinstance(error, LineTooLong):
        # The beginning of the line is all that aiohttp tells; no usual header begins as a URL does.
        url = bytes(error.args[0]).startswith(b"/")
        return UriTooLong("the URL is too long") if url else HeadTooLarge("a header is too long")
    message = error.message
    if TOO_MANY_HEADERS in message:
        return HeadTooLarge("too many headers")
    reason = message.partition(":\n")[0]  # after it aiohttp quotes the bytes
    return InvalidRequest(f"this is no HTTP request: {reason[:200]}")


def protocols_of(
    runner: web.AppRunner, count: _Count, door: Door, cors: Cors, observer: Observer
) -> Callable[[Guard], HttpProtocol]:
    """The protocols of an app that has been set up, every request through the boundary."""
    server: Any = runner.server
    server.request_handler = Boundary(server.request_handler, runner.app.router, count, door, cors, observer)
    return lambda guard: HttpProtocol(server, guard, count)
