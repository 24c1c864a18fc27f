"""The gateway as its host sees it: start, set_workers, status, drain, stop. Imports no torch.

start -> ports bound, not ready
set_workers -> readiness proves a pair by a real request -> ready
drain -> new requests get 503, running ones finish; stop -> ports closed
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from tercet.core import ExpertRows, Moves, Role, WorkerInfo
from tercet.errors import UnsupportedModel
from tercet.metrics import Members, Metrics, Placing
from tercet.models.sources import load_config, load_tokenizer, locate_tower, served_name
from tercet.models.tokenizer import Tokenizer
from tercet.models.vision.config import VisionConfig
from tercet.models.vision.prompt import ImagePrompts
from tercet.models.vision.sizes import ImageSizes, processor_settings
from tercet.roles.gateway.ask import Backend, ServedModel
from tercet.roles.gateway.clients import Door
from tercet.roles.gateway.cors import Cors
from tercet.roles.gateway.dashboard import Dashboard
from tercet.roles.gateway.fetching import Fetcher
from tercet.roles.gateway.frontend import Frontend
from tercet.roles.gateway.grpc_api import SERVICE, InferenceService
from tercet.roles.gateway.grpc_health import HealthService
from tercet.roles.gateway.http_api import HttpApi
from tercet.roles.gateway.http_generation import Generation
from tercet.roles.gateway.http_server import protocols_of
from tercet.roles.gateway.image_files import ImageFiles
from tercet.roles.gateway.observing import Observer
from tercet.roles.gateway.readiness import POLL_S, Readiness
from tercet.roles.router.router import Router
from tercet.spec import ClusterSpec, LimitsSpec, ModelSpec
from tercet.tls import GatewayTls
from tercet.tracing import Tracing
from tercet.wire.bodies import Bodies, BodyLimits
from tercet.wire.connections import ConnectionLimits, Connections
from tercet.wire.gen import inference_pb2_grpc
from tercet.wire.grpc_call import Call
from tercet.wire.grpc_server import GrpcLimits, GrpcServer
from tercet.wire.listening import address, listen_error, most_connections

T = TypeVar("T")

PROBE_TIMEOUT_S = 60.0
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"  # the same messages as v1alpha, which grpcio has
SPARE_STREAMS = 32  # of one gRPC connection, for health and the like beside requests
STANDARD = (health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104, compared, not bound


@dataclass(frozen=True)
class GatewayInfo:
    """The addresses and the ports actually bound."""

    http_url: str
    grpc_address: str


def load_served_model(spec: ModelSpec) -> ServedModel:
    """Tokenizer and limits, without weights. Raises ModelError."""
    config, tokenizer = load_config(spec), load_tokenizer(spec)
    return ServedModel(
        name=served_name(spec),
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        max_context=min(spec.max_context, config.max_context),
        images=None if config.vision is None else _images(config.vision, locate_tower(spec), tokenizer),
    )


def _images(config: VisionConfig, directory: Path, tokenizer: Tokenizer) -> ImagePrompts:
    """Raises ModelError."""
    settings = processor_settings(directory)
    sizes = ImageSizes(config, settings, directory)
    encode, image = partial(tokenizer.encode, add_special=False), tokenizer.token_text(config.image_token)
    if not tokenizer.is_control(config.image_token):
        raise UnsupportedModel(
            f"{directory / 'config.json'}: image_token_id {config.image_token} is {image!r} in the vocabulary, which "
            "any text may have; it must be a control token"
        )
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors")]
    told = json.dumps([asdict(config), settings, sorted(weights)], sort_keys=True)
    return ImagePrompts(config, sizes, encode, image, told)


class Gateway:
    """One HTTP and one gRPC server over one router. `router`, `model` and `fetcher` are for tests."""

    def __init__(
        self,
        spec: ClusterSpec,
        cluster_token: str,
        router: Backend | None = None,
        model: ServedModel | None = None,
        fetcher: Callable[[Metrics], Fetcher] | None = None,
    ) -> None:
        self._spec = spec
        self._spans = Tracing(spec, "gateway", "gateway")
        self._router: Backend = router or Router(spec, cluster_token, self._spans)
        self._model = model or load_served_model(spec.model)
        self._observer = Observer(self._spans, self._model.name, prompts=spec.logging.prompts)
        self._workers: tuple[WorkerInfo, ...] = ()
        told = {"name": spec.name, "topology": spec.topology, "model": self._model.name}
        self._metrics = Metrics(self._router.loads, lambda: self._workers, told)
        images, fetcher = spec.gateway.images, fetcher or partial(Fetcher, spec.gateway.images)
        self._images = ImageFiles(images.cache_bytes, spec.limits.max_held_bytes, self._metrics, fetcher(self._metrics))
        self._frontend = Frontend(spec.limits, self._router, self._model, self._metrics, self._images)
        records = self._frontend.records
        self._router.watch(records.note)
        self._dashboard = Dashboard(spec, self._model.name, self.status, records, self._frontend.offloop)
        timeout_s = min(PROBE_TIMEOUT_S, spec.limits.request_timeout_s)
        self._readiness = Readiness(self._router, self._model, timeout_s, shows=Role.ENCODE in spec.roles)
        connections = _connection_limits(spec.limits)
        self._connections = Connections(connections)
        self._door = Door(spec.gateway.api_keys)
        self._bodies = Bodies(_body_limits(spec.limits, connections.most))
        self._metrics.watch_connections(self._connections.__len__, lambda: self._connections.closed)
        self._metrics.watch_state(lambda: self._readiness.ready, self._router.queued)
        self._metrics.watch_spans(lambda: self._spans.dropped)
        self._stack = AsyncExitStack()

    async def start(self) -> GatewayInfo:
        """Bind both ports. Raises ClusterError naming the port if one is in use, SpecError for its certificate."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, self._spans.close)
            stack.push_async_callback(self._router.close)
            stack.push_async_callback(self._images.close)
            stack.callback(self._frontend.offloop.close)
            stack.callback(self._connections.close)
            http_url = await self._start_http(stack)
            grpc_address = await self._start_grpc(stack)
            self._start_task(stack, asyncio.create_task(self._readiness.run()))
            self._start_task(stack, asyncio.create_task(self._dashboard.series.run()))
            self._stack = stack.pop_all()
        return GatewayInfo(http_url, grpc_address)

    async def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = tuple(workers)
        await self._router.set_workers(workers)

    def members_told(self, target: Mapping[str, int], members: Members) -> None:
        """What the controller wants, role -> workers, and what it last saw of each worker."""
        self._metrics.members_told(target, members)
        self._dashboard.told(target, members)

    def experts_told(self, experts: Mapping[str, Sequence[ExpertRows]]) -> None:
        """What the controller last heard of each worker that has any."""
        self._metrics.experts_told(experts)

    def placement_told(self, moves: Mapping[str, Moves], placing: Placing) -> None:
        """Likewise, of how experts were placed anew."""
        self._metrics.placement_told(moves, placing)

    def role_switched(self, how: str, seconds: float) -> None:
        """Count a worker that has got another role; it took so long since it was asked for."""
        self._metrics.role_switched(how, seconds)

    def status(self) -> dict[str, object]:
        """Plain data for the controller and `tercet status`."""
        return {
            "ready": self._readiness.ready,
            "reason": self._readiness.reason,
            "inflight": self._frontend.inflight,
            "workers": {w.worker_id: self._worker_status(w) for w in self._workers},
        }

    def _worker_status(self, worker: WorkerInfo) -> dict[str, object]:
        load = self._router.loads().get(worker.worker_id)
        told = {name: getattr(worker, name) for name in ("role", "epoch", "pid", "node", "rpc_address")}
        return told | {"load": None if load is None else asdict(load)}

    async def drain(self, timeout_s: float, reason: str = "draining") -> None:
        """Take no new request; return when the running ones have ended, by force after `timeout_s` seconds.

        From now on `/health` and `/ready` are 503 and say the reason, the first one that was given.
        """
        self._readiness.closed = self._readiness.closed or reason
        await self._frontend.drain(timeout_s)

    async def stop(self) -> None:
        """Close the ports and the router. What still runs ends in a typed error; idempotent."""
        await self.drain(0)
        await self._stack.aclose()

    async def _start_http(self, stack: AsyncExitStack) -> str:
        listen, metrics = self._spec.gateway.http, self._metrics
        cors = Cors(self._spec.gateway.cors_origins)
        generation = Generation(self._frontend, self._bodies)
        api = HttpApi(self._frontend, self._router, self._readiness, generation, self._dashboard, cors)
        # handler_cancellation: a client that goes away must free its blocks at once.
        runner = web.AppRunner(api.app(), handler_cancellation=True, shutdown_timeout=2.0)
        await runner.setup()
        self._http = runner
        stack.push_async_callback(runner.cleanup)
        try:
            protocols = protocols_of(runner, metrics.failed, self._door, cors, self._observer)
            tls = self._tls("http/1.1")
            server = await self._connections.listen(listen.host, listen.port, protocols, tls)
        except OSError as error:
            raise listen_error(listen.host, listen.port, error, "gateway.http") from error
        stack.callback(server.close)
        host = "127.0.0.1" if listen.host in WILDCARDS else listen.host
        scheme = "http" if tls is None else "https"
        return f"{scheme}://{address(host, server.sockets[0].getsockname()[1])}"

    def _tls(self, *protocols: str) -> GatewayTls | None:
        wanted = self._spec.gateway.tls
        return None if wanted is None else GatewayTls(wanted, protocols)

    async def _start_grpc(self, stack: AsyncExitStack) -> str:
        listen, limits = self._spec.gateway.grpc, self._spec.limits
        bounds = GrpcLimits(limits.max_body_bytes, limits.max_inflight_requests + SPARE_STREAMS, frozenset(STANDARD))
        server = GrpcServer(
            self._connections,
            self._bodies,
            bounds,
            self._metrics.failed,
            self._offload,
            self._let_in,
            self._tls("h2"),
        )
        self._grpc = server
        checker = HealthService(SERVICE)
        service = InferenceService(self._frontend, self._observer)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call] # generated
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)  # type: ignore[arg-type]  # it has what is used
        _add_reflection(server)
        stack.push_async_callback(server.stop, 1.0)
        try:
            port = await server.start(listen.host, listen.port)
        except OSError as error:
            raise listen_error(listen.host, listen.port, error, "gateway.grpc") from error
        self._start_task(stack, asyncio.create_task(self._follow(checker)))
        return address(listen.host, port)

    def _let_in(self, call: Call) -> None:
        call.caller = self._door.caller(call.header(b"authorization"), call.address())

    async def _offload(self, call: Call, size: int, work: Callable[[], T]) -> T:
        """A gRPC message is read as an HTTP body is."""
        return await self._frontend.offloop.parse(call.caller.client, size, work)

    async def _follow(self, checker: HealthService) -> None:
        """The standard health service says SERVING while the gateway is ready."""
        while True:
            checker.set(self._readiness.ready)
            await asyncio.sleep(POLL_S)

    def _start_task(self, stack: AsyncExitStack, task: asyncio.Task[None]) -> None:
        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        stack.push_async_callback(end)


def _add_reflection(server: GrpcServer) -> None:
    servicer = reflection.aio.ReflectionServicer((SERVICE, *STANDARD))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    method = "ServerReflectionInfo"
    server.add_registered_method_handlers(REFLECTION_V1, {method: server.handler(reflection.SERVICE_NAME, method)})


def _body_limits(limits: LimitsSpec, connections: int) -> BodyLimits:
    """A connection that is sending a body counts as served and is not evicted, so only some may be in that state."""
    held, unfinished = max(limits.max_held_bytes, limits.max_body_bytes), max(1, connections // 4)
    return BodyLimits(limits.max_body_bytes, held, limits.body_grace_s, limits.min_body_rate, unfinished)


def _connection_limits(limits: LimitsSpec) -> ConnectionLimits:
    most = most_connections(limits.max_connections)
    return ConnectionLimits(most, limits.head_timeout_s, limits.idle_timeout_s)
