"""UCX through `ucxx`: tagged messages over whatever UCX finds that can tell a dead peer (TCP; RDMA with a system UCX).
The message goes first, on the channel; the bytes follow as one UCX message; and the decode side's PROBE_ACK on the
channel ends the write, since UCX reports a send as done before its last bytes have left.

Copies: those of UCX, one or two per side over TCP; and one per side where the bytes are scattered, which is why units
travel packed unless runs are large. Pumping: both ends, only while a write is under way; between, they block in poll
on the worker's descriptor.

Cancel: exact. A receive is posted only while `land` runs. If that fails, its UCX worker is destroyed before the error
is raised, so that what the peer still sends cannot be placed. Schemes in which the sender's process places bytes are
turned off.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import secrets
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from tercet.errors import PeerDown, ProtocolViolation, TercetError
from tercet.transfer.links.channel import Channel
from tercet.transfer.protocol.messages import ProbeAck
from tercet.transfer.transports.contract import Inlet, LinkContext, Outlet, Parcel, Transport, library_errors

INSTALL = "pip install --no-deps ucxx-cu12 libucxx-cu12 'libucx-cu12<1.22'"
CONFIG = {
    "RNDV_THRESH": "0",  # rendezvous always: an eager message would be buffered, where it cannot be cancelled
    "RNDV_SCHEME": "get_zcopy",  # the receiver fetches, or UCX copies at both ends; never the sender alone
    "TCP_TX_SEG_SIZE": "256k",  # 8 KB otherwise, at half the rate
    "TCP_RX_SEG_SIZE": "256k",
}
GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR
BACKUP_MS = 50  # how often a worker is checked even if its descriptor is silent


class UcxTransport(Transport):
    name = "ucx"
    pack_below = 1 << 20

    @classmethod
    def missing(cls) -> str | None:
        try:
            _library()
        except (ImportError, OSError) as error:
            if importlib.util.find_spec("ucxx") is None and importlib.util.find_spec("ucp") is not None:
                return f"ucxx; ucx-py (`ucp`) is archived and not supported; {INSTALL}"
            return f"ucxx: {error}; {INSTALL}"
        return None

    def inlet(self, context: LinkContext) -> Inlet:
        return _UcxInlet(context)

    def outlet(self, context: LinkContext) -> Outlet:
        return _UcxOutlet(context)


class _UcxInlet(Inlet):
    def __init__(self, context: LinkContext) -> None:
        self._secret = secrets.randbits(32)  # so that a stranger who finds the worker's port cannot guess a tag
        self._number = 0  # of the last message
        self._staging = bytearray()
        self._worker = _UcxWorker(context)
        self.blob = msgpack.packb([self._worker.address(), self._secret])

    def land(self, channel: Channel, payload: int, views: Sequence[memoryview]) -> None:
        if payload:
            raise ProtocolViolation("DATA over ucx carries no bytes on the channel")
        if len(views) == 1:
            self._receive(channel, views[0])
            return
        rest = self._staged(sum(map(len, views)))
        self._receive(channel, rest)
        for view in views:
            view[:] = rest[: len(view)]
            rest = rest[len(view) :]

    def pass_over(self, channel: Channel, payload: int, num_bytes: int) -> None:
        self.land(channel, payload, [self._staged(num_bytes)])

    def fence(self) -> bool:
        self._worker.close()
        return True

    def _staged(self, num_bytes: int) -> memoryview:
        if len(self._staging) < num_bytes:
            self._staging = bytearray(num_bytes)
        return memoryview(self._staging)[:num_bytes]

    def _receive(self, channel: Channel, view: memoryview) -> None:
        self._number += 1
        try:
            self._worker.receive(channel, view, _tag(self._secret, self._number))
            channel.send(ProbeAck(len(view)))
        except BaseException:
            self._worker.close()  # nothing may land in the view from here on
            raise


class _UcxOutlet(Outlet):
    def __init__(self, context: LinkContext) -> None:
        self._number = 0  # of the last message
        self._worker = _UcxWorker(context)
        try:
            address, self._secret = msgpack.unpackb(context.blob)
            self._worker.meet(address)
        except (ValueError, TypeError) as error:
            self._worker.close()
            raise ProtocolViolation(f"no ucx worker in the WELCOME: {error}") from error
        except TercetError:
            self._worker.close()
            raise

    def write(self, channel: Channel, parcel: Parcel) -> None:
        self._number += 1
        views = parcel.views
        whole = views[0] if len(views) == 1 else memoryview(b"".join(views))
        try:
            channel.send(parcel.message)
            self._worker.send(channel, whole, _tag(self._secret, self._number))
            answer, _ = channel.receive()
            if answer != ProbeAck(len(whole)):
                raise ProtocolViolation(f"expected PROBE_ACK of {len(whole)} bytes, got {answer!r:.80}")
        except BaseException:
            self._worker.close()  # the source is about to be reused, so nothing may read it from here on
            raise

    def close(self) -> None:
        self._worker.close()


class _UcxWorker:
    """A UCX context, its worker and at most one endpoint and one request. For one thread at a time.

    All live in attributes, never in locals: the traceback of an error must not keep what `close` is to end."""

    def __init__(self, context: LinkContext) -> None:
        self._timeout_s = context.timeout_s
        self._endpoint: Any = None
        self._request: Any = None
        with library_errors("no ucx worker"):
            self._api = _library()
            features = (self._api.Feature.TAG, self._api.Feature.WAKEUP)
            config = CONFIG | ({"NET_DEVICES": "lo"} if context.is_local else {})
            self._worker: Any = self._api.UCXWorker(self._api.UCXContext(config, feature_flags=features))
            self._worker.init_blocking_progress_mode()
            self._fd = self._worker.epoll_file_descriptor

    def address(self) -> bytes:
        with library_errors("no ucx address"):
            return bytes(self._api.UCXAddress.create_from_worker(self._worker).tobytes())

    def meet(self, address: bytes) -> None:
        with library_errors("the decode worker's ucx worker cannot be reached"):
            peer = self._api.UCXAddress.create_from_buffer(address)
            self._endpoint = self._api.UCXEndpoint.create_from_worker_address(self._worker, peer, True)

    def send(self, channel: Channel, view: memoryview, tag: int) -> None:
        """Returns when the peer has answered on the channel."""
        with library_errors("the ucx send failed"):
            self._request = self._endpoint.tag_send(_array(view), self._api.UCXXTag(tag))
            self._pump(channel, GONE, self._is_over)
            self._pump(channel, GONE | select.POLLIN, lambda: False)

    def receive(self, channel: Channel, view: memoryview, tag: int) -> None:
        """Returns when the view is filled."""
        with library_errors("the ucx receive failed"):
            self._request = self._worker.tag_recv(_array(view), self._api.UCXXTag(tag))
            self._pump(channel, GONE, self._is_over)

    def close(self) -> None:
        """End the worker: nothing is read or placed by it any more. Idempotent."""
        with contextlib.suppress(Exception):  # the peer may be gone; what matters is that the worker ends
            if self._worker is not None:
                self._worker.cancel_inflight_requests()
        self._request = self._endpoint = self._worker = None

    def _is_over(self) -> bool:
        """Whether the request is over; raises its error if it failed."""
        if not self._request.completed:
            return False
        self._request.check_error()
        self._request = None
        return True

    def _pump(self, channel: Channel, mask: int, done: Callable[[], bool]) -> None:
        """Drive the worker until `done`, or until there is something to read if `mask` says so."""
        poller = select.poll()
        poller.register(channel.sock, mask)
        poller.register(self._fd, select.POLLIN)
        heard = time.monotonic()
        while True:
            while self._worker.progress_once():
                heard = time.monotonic()
            if done():
                return
            events = dict(poller.poll(BACKUP_MS if self._worker.arm() else 0))
            event = events.get(channel.sock.fileno(), 0)
            if event & select.POLLIN:
                return
            if event:
                raise PeerDown("the transfer connection ended during a ucx write")
            if time.monotonic() - heard > self._timeout_s:
                raise PeerDown(f"a ucx write made no progress for {self._timeout_s} s")


def _library() -> Any:
    """The core API. Raises ImportError or OSError."""
    os.environ.setdefault("UCX_TCP_CM_REUSEADDR", "y")
    with contextlib.suppress(ModuleNotFoundError):  # ucxx itself loads the UCX wheel only if librmm is there
        importlib.import_module("libucx").load_library()
    before = {*os.environ}
    try:
        return importlib.import_module("ucxx._lib.libucxx")
    finally:
        for name in {*os.environ} - before:
            if name.startswith("UCX_"):  # what ucxx prefers must not hold for NIXL's UCX too (decision 009)
                del os.environ[name]


def _array(view: memoryview) -> Any:
    return importlib.import_module("ucxx._lib.arr").Array(view)


def _tag(secret: int, number: int) -> int:
    return (secret << 32) | (number & 0xFFFFFFFF)
