"""A real gateway on free ports over a fake router."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tercet.core import Role
from tercet.roles.gateway.gateway import Gateway, GatewayInfo
from tercet.spec import ClusterSpec
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import MODEL


def spec(**limits: Any) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "topology": "pd",
            "roles": {Role.PREFILL: {}, Role.DECODE: {"replicas": 2}},
            "gateway": {"http": {"port": 0}, "grpc": {"port": 0}},
            "limits": limits,
        }
    )


@asynccontextmanager
async def running(router: FakeRouter, **limits: Any) -> AsyncIterator[tuple[Gateway, GatewayInfo]]:
    gateway = Gateway(spec(**limits), "token", router, MODEL)
    info = await gateway.start()
    try:
        yield gateway, info
    finally:
        await gateway.stop()
