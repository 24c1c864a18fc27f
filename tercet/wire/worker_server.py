"""The worker's end of the stream: legs in, reports out; reports of one event-loop turn are sent in one message.

Who calls whom: the service calls the `LegHandler` (a role) on the event loop; the role answers through the
`ReportStream` that came with the leg, also on the event loop. When a gateway's stream ends, `disconnected` tells the
role to abort what it carried.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Protocol

import grpc

from tercet import secret
from tercet.core import Done, Leg, Load, Progress, PromptLogprobs, Ticket, TokenEvent
from tercet.errors import TercetError
from tercet.tls import PeerTls
from tercet.wire.bodies import Bodies, BodyLimits
from tercet.wire.codec import (
    GATEWAY,
    NONCE_METADATA,
    WORKER,
    done_to_proto,
    leg_from_proto,
    load_to_proto,
    progress_to_proto,
    scores_to_proto,
    ticket_from_proto,
    ticket_to_proto,
    token_to_proto,
)
from tercet.wire.connections import ConnectionLimits, Connections
from tercet.wire.gen import worker_pb2 as pb
from tercet.wire.gen import worker_pb2_grpc
from tercet.wire.grpc_call import Call
from tercet.wire.grpc_server import GrpcLimits, GrpcServer
from tercet.wire.listening import address, listen_error, most_connections

PROVE_S = 5.0  # for both proofs
SERVICE = pb.DESCRIPTOR.services_by_name["Worker"].full_name
LOAD_PERIOD_S = 0.5  # a load is sent at least so often; its absence tells the gateway that the worker hangs
MESSAGE_BYTES = 64 << 20
# One gateway connects, and who watches or measures; strangers are closed first.
CONNECTIONS = ConnectionLimits(most=64, head_s=10.0, idle_s=60.0)
BODIES = BodyLimits(
    MESSAGE_BYTES, max_held_bytes=4 * MESSAGE_BYTES, grace_s=10.0, min_rate=64 * 1024, max_unfinished=64
)


class ReportStream:
    """Reports to one gateway. Event loop only; never blocks: the gateway bounds what it asks for."""

    def __init__(self) -> None:
        self._reports: list[pb.Report] = []
        self._posted = asyncio.Event()

    def admitted(self, leg: Leg) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), admitted=pb.Admitted()))

    def prompt_logprobs(self, leg: Leg, scores: PromptLogprobs) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), prompt=scores_to_proto(scores)))

    def token(self, leg: Leg, event: TokenEvent) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), token=token_to_proto(event)))

    def progress(self, leg: Leg, progress: Progress) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), progress=progress_to_proto(progress)))

    def finished(self, leg: Leg, done: Done) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), finished=done_to_proto(done)))

    def rejected(self, leg: Leg, reason: str) -> None:
        self._post(pb.Report(ticket=ticket_to_proto(leg.ticket), rejected=pb.Rejected(reason=reason)))

    def failed(self, leg: Leg, error: TercetError) -> None:
        self._post(
            pb.Report(ticket=ticket_to_proto(leg.ticket), failed=pb.Failed(code=error.code(), message=str(error)))
        )

    def _post(self, report: pb.Report) -> None:
        self._reports.append(report)
        self._posted.set()

    async def take(self) -> list[pb.Report]:
        """What has been posted; empty when nothing was for a load period."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOAD_PERIOD_S):
                await self._posted.wait()
        self._posted.clear()
        reports, self._reports = self._reports, []
        return reports


class LegHandler(Protocol):
    def start(self, leg: Leg, stream: ReportStream) -> None:
        """Begin a leg; every leg ends in exactly one of finished, rejected, failed, unless it is aborted."""

    def abort(self, ticket: Ticket) -> None:
        """Give a leg up; unknown ones are ignored."""

    def meet(self, endpoints: Sequence[str]) -> None:
        """Connect to these workers of the next stage, before the first request needs them."""

    def disconnected(self, stream: ReportStream) -> None:
        """Give up every leg that came with this stream."""


class _Service(worker_pb2_grpc.WorkerServicer):
    def __init__(self, handler: LegHandler, load: Callable[[], Load], cluster_token: str) -> None:
        self._handler = handler
        self._load = load
        self._token = cluster_token
        self.streams = 0  # that are open

    async def Connect(  # noqa: N802  # the proto's name
        self, request_iterator: AsyncIterator[pb.Command], context: Call
    ) -> AsyncIterator[pb.Reports]:
        """Both sides prove that they know the cluster's secret; then commands go in and reports out."""
        if not await self._is_proven(request_iterator, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the caller does not know this cluster's token")
        with context.served():
            stream = ReportStream()
            self.streams += 1
            commands = asyncio.create_task(self._take_commands(request_iterator, stream))
            try:
                yield pb.Reports(load=load_to_proto(self._load()))
                while not commands.done():
                    reports = await stream.take()
                    yield pb.Reports(reports=reports, load=load_to_proto(self._load()))
                commands.result()  # a fault in a handler ends the stream, and is told
            finally:
                commands.cancel()
                self.streams -= 1
                self._handler.disconnected(stream)
                await asyncio.wait([commands])  # it still holds the iterator, which is closed next

    async def _is_proven(self, commands: AsyncIterator[pb.Command], context: Call) -> bool:
        """Whether the gateway takes our proof and sends its own in time, and it proves that it knows the secret."""
        ours, theirs = secret.nonce(), context.header(NONCE_METADATA.encode())
        proof = secret.proof(self._token, WORKER, theirs, ours)
        try:
            async with asyncio.timeout(PROVE_S):
                await context.write(pb.Reports(challenge=pb.Challenge(nonce=ours, proof=proof)))
                first = await anext(commands)
        except (TimeoutError, StopAsyncIteration):
            return False
        return secret.proves(first.prove.proof, self._token, GATEWAY, ours, theirs)

    async def _take_commands(self, commands: AsyncIterator[pb.Command], stream: ReportStream) -> None:
        async for command in commands:
            if command.HasField("start"):
                self._handler.start(leg_from_proto(command.start), stream)
            elif command.HasField("abort"):
                self._handler.abort(ticket_from_proto(command.abort.ticket))
            elif command.HasField("meet"):
                self._handler.meet(command.meet.endpoints)


class WorkerServer:
    """The gRPC server of one worker."""

    def __init__(
        self, handler: LegHandler, load: Callable[[], Load], cluster_token: str, tls: PeerTls | None = None
    ) -> None:
        limits = replace(CONNECTIONS, most=most_connections(CONNECTIONS.most))
        self._connections = Connections(limits)
        # Who has proven nothing yet only watches: it is closed to make room.
        bounds = GrpcLimits(MESSAGE_BYTES, max_streams=16, watching=frozenset([SERVICE]))
        self._server = GrpcServer(self._connections, Bodies(BODIES), bounds, tls=tls)
        self._service = _Service(handler, load, cluster_token)
        worker_pb2_grpc.add_WorkerServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]  # generated code

    @property
    def streams(self) -> int:
        """Of gateways; each is ended by its gateway once that has heard the end of all its legs."""
        return self._service.streams

    async def start(self, host: str) -> str:
        """-> host:port. Raises ClusterError when no port can be bound."""
        try:
            return address(host, await self._server.start(host, 0))
        except OSError as error:
            raise listen_error(host, 0, error) from error

    async def stop(self) -> None:
        await self._server.stop()
        self._connections.close()
