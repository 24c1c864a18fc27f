"""A model that sees, without a tower; and a server of pictures on a real socket of loopback, under names of our own."""

from __future__ import annotations

import asyncio
import io
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image

from tercet.core import PromptImage
from tests.fakes.tokenizer import MODEL

HOST = "pictures.test"


class FakePrompts:
    """In the place of ImagePrompts: images take no tokens."""

    def expanded(
        self, ids: Sequence[int], images: Sequence[tuple[bytes, tuple[int, int]]]
    ) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        return tuple(ids), tuple(PromptImage(b"", (1, *size), ((0, 1),), content) for content, size in images)


SEEING = replace(MODEL, max_context=65536, images=FakePrompts())


def picture(colour: int = 3, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(file, kind)
    return file.getvalue()


class Names(AbstractResolver):
    """Each name's addresses; of several answers each is given once, the last one for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): found for name, found in answers.items()}
        self.asked: Counter[str] = Counter()
        self.silent = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked[host] += 1
        if self.silent:
            await asyncio.Event().wait()
        if host not in self.answers:
            raise OSError("no such name")
        found = self.answers[host]
        addresses = found.pop(0) if len(found) > 1 else found[0]
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)
            for address, kind in zip(addresses, kinds, strict=True)
        ]

    async def close(self) -> None:
        pass


class Pictures:
    """`pages`: path -> body, or what answers. Remembers what it was asked, and who is connected."""

    def __init__(self) -> None:
        self.port = 0
        self.close: Callable[[], Awaitable[None]]
        self.pages: dict[str, bytes | Callable[[web.Request], object]] = {"/a.png": picture(1), "/b.png": picture(2)}
        self.asked: list[web.Request] = []
        self.reading = 0  # answers that are being given

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        page = self.pages.get(request.path)
        if page is None:
            return web.Response(status=404, text="the secret of this page")
        if isinstance(page, bytes):
            return web.Response(body=page, content_type="image/png")
        self.reading += 1
        try:
            return await page(request)
        finally:
            self.reading -= 1


@asynccontextmanager
async def pictures() -> AsyncIterator[Pictures]:
    made = Pictures()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.close = site.stop  # listens no more
    made.port = runner.addresses[0][1]
    try:
        yield made
    finally:
        await runner.cleanup()


def moved(to: str, status: int = 302) -> Callable[[web.Request], object]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": to})

    return answer


def streamed(
    chunk: bytes, pause_s: float = 0.0, most: int = 1 << 30, **headers: str
) -> Callable[[web.Request], object]:
    """The chunk again and again."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={name.replace("_", "-"): value for name, value in headers.items()})
        await response.prepare(request)
        for _ in range(most):
            await response.write(chunk)
            await asyncio.sleep(pause_s)
        return response

    return answer
