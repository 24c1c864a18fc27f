"""The gateway's end of the stream to one worker: sends legs, receives reports, and reports the loss of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from tercet import secret
from tercet.core import Admitted, Leg, Load, Outcome, Rejection, Ticket, WorkerInfo
from tercet.errors import PeerMismatch, from_wire
from tercet.tls import PeerTls
from tercet.wire.codec import (
    GATEWAY,
    NONCE_METADATA,
    WORKER,
    done_from_proto,
    leg_to_proto,
    load_from_proto,
    progress_from_proto,
    scores_from_proto,
    ticket_from_proto,
    ticket_to_proto,
    token_from_proto,
)
from tercet.wire.gen import worker_pb2 as pb
from tercet.wire.gen import worker_pb2_grpc

log = logging.getLogger(__name__)

RECONNECT_S = 0.2
SILENT_S = 5.0  # a worker reports its load every 0.5 s; one silent for so long hangs, and its requests go elsewhere
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own, 120 s, would outlast every restart
    ("grpc.enable_http_proxy", 0),  # between our own processes nothing goes through a proxy
    ("grpc.keepalive_time_ms", 3000),  # a path that drops packets is noticed; each new stream would wait in it for ever
    ("grpc.keepalive_timeout_ms", 5000),  # not before the stream itself is held for silent
    ("grpc.http2.ping_timeout_ms", 5000),  # by default 60 s, and then that is the one that counts
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no bound
]


_Outbox = asyncio.Queue[pb.Command | None]  # None: the stream has ended


class WorkerLink:
    """The stream to one worker. Event loop only.

    on_reports(reports): the next events of its legs, in order: what one message holds, as an engine step made it.
    on_load(load): what the worker says of itself.
    on_change(fault): None: the stream came up. Else it was lost, perhaps by that fault, with what was under way on it.
    """

    def __init__(
        self,
        info: WorkerInfo,
        cluster_token: str,
        on_reports: Callable[[Sequence[tuple[Ticket, Outcome]]], None],
        on_load: Callable[[Load], None],
        on_change: Callable[[str | None], None],
        tls: PeerTls | None = None,
    ) -> None:
        self.info = info
        self.up = False
        self.fault = ""  # why the last stream ended
        self._token = cluster_token
        self._tls = tls
        self._on_reports = on_reports
        self._on_load = on_load
        self._on_change = on_change
        self._outbox: _Outbox = asyncio.Queue()
        self._last_word = 0.0
        self._task = asyncio.create_task(self._keep_connected(), name=f"link-{info.worker_id}")

    def start(self, leg: Leg) -> None:
        self._outbox.put_nowait(leg_to_proto(leg))

    def abort(self, leg: Leg) -> None:
        self._outbox.put_nowait(pb.Command(abort=pb.Abort(ticket=ticket_to_proto(leg.ticket))))

    def meet(self, endpoints: Sequence[str]) -> None:
        """Have a prefill worker connect to decode workers."""
        self._outbox.put_nowait(pb.Command(meet=pb.Meet(endpoints=endpoints)))

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep_connected(self) -> None:
        while True:
            try:
                async with self._channel() as channel:
                    await self._converse(worker_pb2_grpc.WorkerStub(channel))  # type: ignore[no-untyped-call]  # generated
            except grpc.aio.AioRpcError as error:
                self.fault = f"{error.code().name}: {error.details()}"
            except PeerMismatch as error:
                self.fault = str(error)
            except asyncio.CancelledError:
                # Ours, when the task is being cancelled; else the watch cut a silent stream.
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                self.fault = f"silent for {SILENT_S} s"
            except Exception as error:  # of our own, or a report that cannot be read: the next stream is a new try
                log.exception("the stream to %s failed", self.info.worker_id)
                self.fault = f"unexpected {type(error).__name__}: {error}"
            await asyncio.sleep(RECONNECT_S)

    def _channel(self) -> grpc.aio.Channel:
        """A new one for each stream: certificates may have been renewed."""
        if self._tls is None:
            return grpc.aio.insecure_channel(self.info.rpc_address, options=OPTIONS)
        files, name = self._tls.files(), self._tls.name
        named = [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
        credentials = grpc.ssl_channel_credentials(files.root, files.key, files.chain)
        return grpc.aio.secure_channel(self.info.rpc_address, credentials, options=[*OPTIONS, *named])

    async def _converse(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        """One stream: the proofs, then reports until it ends."""
        nonce, outbox = secret.nonce().hex(), _Outbox()
        call = stub.Connect(_commands(outbox), metadata=((NONCE_METADATA, nonce),))
        watch = asyncio.create_task(self._watch(call))
        try:
            proven = False
            async for reports in call:
                if proven:
                    self._take(reports)
                else:
                    outbox.put_nowait(pb.Command(prove=self._prove(reports.challenge, nonce.encode())))
                    self._outbox, proven = outbox, True
        finally:
            watch.cancel()
            call.cancel()
            outbox.put_nowait(None)  # a call that has ended by itself would wait for commands for ever
            if self.up:
                self.up = False
                self._on_change(self.fault)

    def _prove(self, challenge: pb.Challenge, ours: bytes) -> pb.Prove:
        """The answer to the worker's first word. Raises PeerMismatch if that does not prove the secret."""
        if not secret.proves(challenge.proof, self._token, WORKER, ours, challenge.nonce):
            raise PeerMismatch(f"what answers at {self.info.rpc_address} does not know this cluster's token")
        return pb.Prove(proof=secret.proof(self._token, GATEWAY, challenge.nonce, ours))

    async def _watch(self, call: grpc.aio.StreamStreamCall[pb.Command, pb.Reports]) -> None:
        """End a stream that has gone silent: the process is stopped, or the host is gone."""
        self._last_word = time.monotonic()
        while time.monotonic() - self._last_word < SILENT_S:
            await asyncio.sleep(SILENT_S / 5)
        call.cancel()

    def _take(self, reports: pb.Reports) -> None:
        self._last_word = time.monotonic()
        self._on_load(load_from_proto(reports.load))
        if not self.up:
            self.up = True
            self._on_change(None)
        if reports.reports:
            self._on_reports([(ticket_from_proto(report.ticket), _outcome(report)) for report in reports.reports])


async def _commands(outbox: _Outbox) -> AsyncIterator[pb.Command]:
    while (command := await outbox.get()) is not None:
        yield command


def _outcome(report: pb.Report) -> Outcome:
    kind = report.WhichOneof("kind")
    if kind == "token":
        return token_from_proto(report.token)
    if kind == "finished":
        return done_from_proto(report.finished)
    if kind == "admitted":
        return Admitted()
    if kind == "progress":
        return progress_from_proto(report.progress)
    if kind == "prompt":
        return scores_from_proto(report.prompt)
    if kind == "rejected":
        return Rejection(report.rejected.reason)
    return from_wire(report.failed.code, report.failed.message)
