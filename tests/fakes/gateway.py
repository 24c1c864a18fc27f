"""A real gateway on free ports over a fake router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from tercet.core import Role
from tercet.metrics import Metrics
from tercet.roles.gateway.ask import ServedModel
from tercet.roles.gateway.fetching import Fetcher
from tercet.roles.gateway.gateway import Gateway, GatewayInfo
from tercet.spec import ClusterSpec, GatewayImagesSpec
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
async def running(
    router: FakeRouter,
    *,
    model: ServedModel = MODEL,
    images: Mapping[str, Any] = MappingProxyType({}),
    doors: Mapping[str, Any] = MappingProxyType({}),
    fetcher: Callable[[Metrics], Fetcher] | None = None,
    **limits: Any,
) -> AsyncIterator[tuple[Gateway, GatewayInfo]]:
    """images: of the spec's gateway. doors: its api_keys, tls, cors_origins."""
    asked = spec(**limits)
    changed = asked.gateway.model_copy(update={"images": GatewayImagesSpec(**images), **doors})
    asked = asked.model_copy(update={"gateway": changed})
    gateway = Gateway(asked, "token", router, model, fetcher)
    info = await gateway.start()
    try:
        yield gateway, info
    finally:
        await gateway.stop()
