"""The standard gRPC health service over the gateway's readiness.

grpcio's own asyncio servicer holds a lock while it writes to a watcher, so that one that does not read would keep all
others, and whoever sets the state, waiting.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tercet.wire.grpc_call import Call

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):
    """One state for every service of the port, and for the port itself (the empty name)."""

    def __init__(self, *services: str) -> None:
        self._services = ("", *services)
        self._state: int = NOT_SERVING
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        state = SERVING if serving else NOT_SERVING
        if state != self._state:
            self._state = state
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Call) -> Any:  # noqa: N802  # the proto's name
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:60]!r}")
        return health_pb2.HealthCheckResponse(status=self._state)

    async def List(self, request: Any, context: Call) -> Any:  # noqa: N802
        statuses = {name: health_pb2.HealthCheckResponse(status=self._state) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # stubs lag

    async def Watch(self, request: Any, context: Call) -> None:  # noqa: N802
        """Each state that the client has time to hear of, until it goes away."""
        known, told = request.service in self._services, None
        while True:
            changed = self._changed
            state = self._state if known else SERVICE_UNKNOWN
            if state != told:
                told = state
                await context.write(health_pb2.HealthCheckResponse(status=state))
            await changed.wait()
