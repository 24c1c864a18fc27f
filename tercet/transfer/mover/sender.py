"""The prefill side of the KV mover: connects to decode workers and writes layers as they are computed.

Threads: one reader per pair, one writer per data link, one clock; a dial runs on the thread that calls `open` or
`connect`. All state is `Outbound`, behind one lock. `on_event` is called under that lock, in order, on a mover thread;
it must be quick and must not call back into the sender.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from tercet.core import PairState, Ticket
from tercet.errors import PeerDown, ProtocolViolation, TercetError
from tercet.transfer.links.channel import Channel, Mailbox, join_all
from tercet.transfer.memory.device import KvRegion
from tercet.transfer.memory.layout import Pair
from tercet.transfer.mover.dialer import DecodePeer, Dialer
from tercet.transfer.mover.on_device import DeviceLoader
from tercet.transfer.mover.parcels import Loader, loader_of
from tercet.transfer.protocol.effects import Cut, PeerKey, Send
from tercet.transfer.protocol.facts import SendEvent
from tercet.transfer.protocol.messages import Goodbye, Written
from tercet.transfer.protocol.outbound import MAX_LARGE_WRITE, MAX_WRITE, Outbound
from tercet.transfer.protocol.outgoing import OutboundEffect, Ready, Write
from tercet.transfer.transports.contract import HANDSHAKE_S, STOP_S, MoverConfig, Outlet, Transport, refuse_other_memory


class KvSender:
    def __init__(
        self,
        config: MoverConfig,
        region: KvRegion,
        transports: Sequence[Transport],
        on_event: Callable[[SendEvent], None],
        computed: Callable[[], int] | None = None,
    ) -> None:
        """computed: how much the engine that fills the source has done so far; it grows while the engine makes
        progress. None: unknown, so the engine is assumed to make progress. Raises SpecError if a transport cannot
        move KV in this region's memory."""
        refuse_other_memory(transports, region)
        self._config = config
        self._computed = computed or itertools.count(1).__next__
        self._on_event = on_event
        self._outbound = Outbound(config.lease_s)
        self._region = region
        self._lock = threading.Lock()
        self._dialer = Dialer(config, region, transports, self._lock)
        self._dialing: dict[str, Future[DecodePeer]] = {}  # endpoint -> the handshake that all callers wait for
        self._peers: dict[str, DecodePeer] = {}  # endpoint -> pair, until no more of its writes can follow
        self._stopping = threading.Event()
        self._ticking = threading.Thread(target=self._clock, name="kv-clock", daemon=True)
        self._ticking.start()

    # ---- verbs, any thread

    def open(
        self, ticket: Ticket, endpoint: str | list[str], num_tokens: int, deadline: float, dial: bool = True
    ) -> str:
        """Offer a request to the decode worker at `endpoint`, or to those at several endpoints, which then each hold a
        part of the layers and heads. If there is no connection, makes one, which may block for some seconds, or raises
        PeerDown if `dial` is false. deadline: time.monotonic(); waiting writes go in the order of their deadlines.
        -> the transport's name, several joined by "+". Raises PeerDown or PeerMismatch."""
        endpoints = [endpoint] if isinstance(endpoint, str) else endpoint
        peers = [self._connect(each, dial) for each in endpoints]
        pairs: dict[PeerKey, Pair] = {peer: peer.pair for peer in peers}
        assert len(pairs) == len(peers), f"{ticket} was opened twice at one endpoint"
        unseen = all(peer.transport.one_sided for peer in peers) and not self._config.integrity
        large = unseen or all(peer.transport.in_device_memory for peer in peers)
        most = MAX_LARGE_WRITE if large else MAX_WRITE
        with self._lock:
            self._run(self._outbound.open(ticket, pairs, num_tokens, deadline, time.monotonic(), most))
            for peer in peers:
                if peer.over:  # it broke between the two steps
                    self._run(self._outbound.peer_down(peer))
        return "+".join(sorted({peer.transport.name for peer in peers}))

    def push(self, ticket: Ticket, layer: int, first: int, blocks: Sequence[int]) -> None:
        """The prompt's blocks from index `first` on are complete in source `blocks` of `layer`."""
        with self._lock:
            self._run(self._outbound.push(ticket, layer, first, blocks))

    def finish(self, ticket: Ticket, note: bytes) -> None:
        """All was pushed. note: for the receiving role, opaque to the mover, at most MAX_NOTE bytes."""
        with self._lock:
            self._run(self._outbound.finish(ticket, note, time.monotonic()))

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        with self._lock:
            self._run(self._outbound.cancel(ticket, error))

    def live(self) -> list[Ticket]:
        with self._lock:
            return self._outbound.live()

    def dropped(self) -> Counter[str]:
        with self._lock:
            return Counter(self._outbound.dropped)

    def resent(self) -> int:
        """Units that receivers asked for again."""
        with self._lock:
            return self._outbound.resent

    def attested(self) -> list[PairState]:
        """The live pairs, as measured when they connected."""
        with self._lock:
            return [peer.attested for peer in self._peers.values() if peer.attested is not None]

    def stop(self) -> None:
        """Tell every peer that nothing will be written any more, and close."""
        self._stopping.set()
        with self._lock:
            peers = list(self._peers.values())
            for ticket in self._outbound.live():
                self._run(self._outbound.cancel(ticket, PeerDown("the prefill worker stops")))
        deadline = time.monotonic() + HANDSHAKE_S
        for peer in peers:
            with self._lock:  # GOODBYE is true once no write of the pair is under way
                if peer.changed.wait_for(partial(self._wrote_all, peer), max(0.0, deadline - time.monotonic())):
                    peer.mailbox.post(Goodbye("the prefill worker stops"))
        for peer in peers:
            peer.mailbox.finish(timeout=1.0)
            peer.shutdown()
        # A thread that is inside a library when the process ends would abort it: also one that drops the last tensor.
        join_all([self._ticking, *(thread for peer in peers for thread in (*peer.threads, peer.reader))], STOP_S)

    def _wrote_all(self, peer: DecodePeer) -> bool:
        return not self._outbound.writing(peer)

    # ---- connecting

    def connect(self, endpoint: str) -> None:
        """Connect to a decode worker before the first request needs it. Raises PeerDown or PeerMismatch."""
        self._connect(endpoint)

    def connected(self, endpoint: str) -> bool:
        """Whether `open` can do without dialling."""
        with self._lock:
            return endpoint in self._peers

    def _connect(self, endpoint: str, dial: bool = True) -> DecodePeer:
        with self._lock:
            if self._stopping.is_set():
                raise PeerDown("the prefill worker stops")
            peer, dialing = self._peers.get(endpoint), self._dialing.get(endpoint)
            if peer is None and not dial:
                raise PeerDown("the pair with the decode worker has just broken")
            if peer is None and dialing is None:
                ours = self._dialing[endpoint] = Future()
        if peer is not None:
            if peer.over:
                raise PeerDown(f"the pair with {peer.worker_id} has just broken")
            return peer
        if dialing is not None:
            return dialing.result()
        try:
            peer = self._begin(self._dialer.dial(endpoint))
        except BaseException as error:
            ours.set_exception(error)
            raise
        else:
            ours.set_result(peer)
            return peer
        finally:
            with self._lock:
                del self._dialing[endpoint]

    def _begin(self, peer: DecodePeer) -> DecodePeer:
        with self._lock:  # `stop` ends the peers that it finds, and none is added behind it
            if not self._stopping.is_set():
                peer.mailbox = Mailbox(peer.channel, peer.worker_id)
                peer.threads = [
                    threading.Thread(target=self._write_loop, args=(peer, *link), name="kv-link", daemon=True)
                    for link in peer.links
                ]
                peer.reader = threading.Thread(target=self._read_loop, args=(peer,), name="kv-read", daemon=True)
                self._peers[peer.endpoint] = peer
                for thread in (*peer.threads, peer.reader):
                    thread.start()
                return peer
        self._dialer.drop(peer)
        raise PeerDown("the prefill worker stops")

    # ---- threads

    def _read_loop(self, peer: DecodePeer) -> None:
        try:
            while True:
                message, payload = peer.channel.receive()
                if payload:
                    raise ProtocolViolation("a decode worker sends no payload")
                with self._lock:
                    self._run(self._outbound.on_message(peer, message, time.monotonic()))
        except (PeerDown, ProtocolViolation):
            pass
        finally:
            self._end(peer)

    def _end(self, peer: DecodePeer) -> None:
        """The pair is over. Only after this a new one with this worker begins, whose HELLO says that this is quiet."""
        peer.shutdown()
        with self._lock:
            peer.over = True
            self._run(self._outbound.peer_down(peer))
            peer.changed.notify_all()
        peer.mailbox.finish(timeout=1.0)
        for thread in peer.threads:
            thread.join()
        with self._lock:
            self._dialer.quiet(peer)
            del self._peers[peer.endpoint]
        peer.channel.close()

    def _write_loop(self, peer: DecodePeer, channel: Channel, outlet: Outlet) -> None:
        """One data link: carry out the most urgent write, again and again."""
        try:
            self._write_all(peer, channel, outlet, loader_of(self._region, self._config.integrity))
        finally:  # an unexpected error is raised, but the pair must end, since nothing more is written here
            peer.shutdown()
            outlet.close()
            channel.close()

    def _write_all(self, peer: DecodePeer, channel: Channel, outlet: Outlet, loader: Loader | DeviceLoader) -> None:
        while (write := self._next(peer)) is not None:
            try:
                outlet.write(channel, loader.parcel(peer.transport, peer.pair, write))
            except (PeerDown, ProtocolViolation):
                peer.shutdown()
            finally:
                written = self._end_write(peer, write)
            if written is not None:
                try:
                    channel.send(written)
                except PeerDown:
                    peer.shutdown()

    def _end_write(self, peer: DecodePeer, write: Write) -> Written | None:
        """-> the WRITTEN that is due after this write, if any. It goes over the write's link, whose reader is awake."""
        with self._lock:
            effects = self._outbound.end_write(peer, write, time.monotonic())
            due = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Written)]
            self._run([e for e in effects if not (isinstance(e, Send) and e.message in due)])
            peer.changed.notify_all()
        return due[0] if due else None

    def _next(self, peer: DecodePeer) -> Write | None:
        """Wait for a write; None: the pair is over."""
        with self._lock:
            while (write := self._outbound.next_write(peer)) is None:
                if peer.over:
                    return None
                peer.changed.wait()
            return write

    def _clock(self) -> None:
        while not self._stopping.wait(self._config.heartbeat_s):
            with self._lock:
                self._run(self._outbound.tick(time.monotonic(), self._computed()))
                self._run(self._outbound.heartbeats())

    def _run(self, effects: Sequence[OutboundEffect]) -> None:
        """Carry effects out, in order; the lock is held."""
        for effect in effects:
            if isinstance(effect, Send | Ready | Cut):
                assert isinstance(effect.peer, DecodePeer)
            if isinstance(effect, Send):
                effect.peer.mailbox.post(effect.message)  # type: ignore[attr-defined]  # checked above
            elif isinstance(effect, Ready):
                effect.peer.changed.notify_all()  # type: ignore[attr-defined]  # checked above
            elif isinstance(effect, Cut):
                effect.peer.shutdown()  # type: ignore[attr-defined]  # checked above
            else:
                self._on_event(effect)
