"""Cross-origin calls from browsers, for the origins that the spec allows (gateway.cors_origins)."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

ANY = "*"
METHODS = "GET, POST, OPTIONS"
PREFLIGHT_S = "86400"  # a browser asks once a day
EXPOSED = "X-Request-Id, X-Ignored-Parameters, Retry-After"


class Cors:
    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)
        self.on = bool(origins)

    def allows(self, origin: str | None) -> bool:
        return origin is not None and origin.isascii() and (ANY in self._origins or origin in self._origins)

    async def on_prepare(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """An aiohttp signal: on each answer, before its head is sent."""
        if not self.on:
            return
        origin = request.headers.get("Origin")
        response.headers.add("Vary", "Origin")
        if origin is not None and self.allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    async def preflight(self, request: web.Request) -> web.Response:
        """Answer a browser's preflight request. Without the headers the browser does not send the real one."""
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        headers = {"Allow": METHODS}
        if self.allows(request.headers.get("Origin")):
            headers |= {
                "Access-Control-Allow-Methods": METHODS,
                "Access-Control-Allow-Headers": wanted if wanted.isascii() else "",
                "Access-Control-Max-Age": PREFLIGHT_S,
            }
        return web.Response(status=204, headers=headers)
