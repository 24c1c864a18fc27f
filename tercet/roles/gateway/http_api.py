"""The routes of the HTTP port.

POST /v1/chat/completions  /v1/completions      http_generation.py
GET  /v1/models  /v1/models/{id}  /health  /ready  /metrics
GET  /dashboard                                 dashboard.py
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from aiohttp import hdrs, web

from tercet.metrics import encoder_for
from tercet.roles.gateway.ask import Backend
from tercet.roles.gateway.cors import Cors
from tercet.roles.gateway.dashboard import Dashboard
from tercet.roles.gateway.frontend import Frontend
from tercet.roles.gateway.http_generation import Generation
from tercet.roles.gateway.http_server import hide_server
from tercet.roles.gateway.readiness import Readiness


class HttpApi:
    """The routes and what they need."""

    def __init__(
        self,
        frontend: Frontend,
        backend: Backend,
        readiness: Readiness,
        generation: Generation,
        dashboard: Dashboard,
        cors: Cors,
    ) -> None:
        self._frontend = frontend
        self._backend = backend
        self._readiness = readiness
        self._generation = generation
        self._dashboard = dashboard
        self._cors = cors
        self._started = int(time.time())

    def app(self) -> web.Application:
        app = web.Application()
        app.on_response_prepare.extend((self._cors.on_prepare, hide_server))
        generation = self._generation
        for path, post in (("/v1/chat/completions", generation.chat), ("/v1/completions", generation.completions)):
            app.router.add_post(path, post, expect_handler=generation.invite)
        for path, get in (
            ("/v1/models", self._models),
            ("/v1/models/{id:.+}", self._model),
            ("/health", self._health),
            ("/ready", self._ready),
            ("/metrics", self._exposition),
        ):
            app.router.add_get(path, get)
        app.router.add_routes(self._dashboard.routes())
        if self._cors.on:
            app.router.add_options("/{path:.*}", self._cors.preflight)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._entry()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._frontend.check_model(request.match_info["id"])
        return web.json_response(self._entry())

    def _entry(self) -> dict[str, Any]:
        model = self._frontend.model
        entry = {"id": model.name, "object": "model", "created": self._started, "owned_by": "tercet"}
        return entry | {"max_model_len": model.max_context}

    async def _health(self, request: web.Request) -> web.Response:
        """200 while every role has a live worker and new requests are taken. It says which workers lack ranks."""
        missing = ", ".join(self._backend.missing_roles())
        fault = self._readiness.closed or (f"no live worker of role {missing}" if missing else "")
        lost = [(worker_id, load.ranks_lost) for worker_id, load in sorted(self._backend.loads().items())]
        degraded = ", ".join(f"{worker_id} goes on without {count} of its ranks" for worker_id, count in lost if count)
        return _state(not fault, fault, degraded)

    async def _ready(self, request: web.Request) -> web.Response:
        """200 once a real request has passed through a live pair, and while one such pair lives."""
        return _state(self._readiness.ready, self._readiness.reason)

    async def _exposition(self, request: web.Request) -> web.Response:
        encode, content_type = encoder_for(request.headers.get(hdrs.ACCEPT, ""))
        write = partial(encode, self._frontend.metrics.collected())
        body = await self._frontend.offloop.render(request.remote or "", write)
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})


def _state(good: bool, reason: str, degraded: str = "") -> web.Response:
    if good:
        return web.json_response({"status": "degraded", "reason": degraded} if degraded else {"status": "ok"})
    return web.json_response({"status": "unavailable", "reason": reason}, status=503)
