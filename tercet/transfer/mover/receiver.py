"""The decode side of the KV mover: listens, lands bytes, verifies them, and reports the facts of each ticket.

Threads: one reader per link, one clock, and those of its acceptor. All state is `Inbound`, behind one lock. `on_event`
is called under that lock, in order, on a mover thread; it must be quick and must not call back into the receiver.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray

from tercet.core import Ticket
from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, TercetError
from tercet.transfer.links.channel import Channel, join_all
from tercet.transfer.links.wires import host_id, tune_tcp, vet_unix
from tercet.transfer.memory.device import KvRegion
from tercet.transfer.memory.region import SCRATCH
from tercet.transfer.mover.acceptor import Acceptor
from tercet.transfer.mover.lander import lander_of
from tercet.transfer.mover.prefill_peer import Link, PrefillPeer
from tercet.transfer.protocol import proof
from tercet.transfer.protocol.effects import Cut, Send
from tercet.transfer.protocol.facts import ReceiveEvent
from tercet.transfer.protocol.inbound import Inbound
from tercet.transfer.protocol.incoming import InboundEffect, Terms
from tercet.transfer.protocol.messages import Data, Goodbye, Hello, Message, Probe, ProbeAck, Welcome, Written
from tercet.transfer.transports.contract import (
    STOP_S,
    Endpoint,
    LinkContext,
    MoverConfig,
    Transport,
    pair_of,
    refuse_other_memory,
)


class KvReceiver:
    def __init__(
        self,
        config: MoverConfig,
        epoch: int,
        region: KvRegion,
        transports: Sequence[Transport],
        on_event: Callable[[ReceiveEvent], None],
    ) -> None:
        """Raises SpecError if a transport cannot move KV in this region's memory."""
        refuse_other_memory(transports, region)
        self._config = config
        self._epoch = epoch
        self._region = region
        self._transports = {t.name: t for t in transports}
        self._on_event = on_event
        self._inbound = Inbound(epoch, config.lease_s)
        self._lock = threading.Lock()
        self._peers: dict[str, PrefillPeer] = {}  # pair id -> peer, until none of its writes can land any more
        self._acceptor = Acceptor(config, self._serve)
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._ticking = threading.Thread(target=self._clock, name="kv-clock", daemon=True)

    # ---- verbs, any thread

    def start(self, *hosts: str) -> Endpoint:
        """Listen on each host. -> the endpoint that prefill workers connect to."""
        unix, tcp = self._acceptor.listen(*hosts)
        self._ticking.start()
        return Endpoint(self._config.worker_id, self._epoch, host_id(), unix, tcp, list(self._transports))

    def admit(self, ticket: Ticket, first_block: int, blocks: Sequence[int], sources: int = 1) -> None:
        """Lease `blocks` to a ticket that so many senders will offer, each a part of the layers and heads held here."""
        with self._lock:
            self._run(self._inbound.admit(ticket, first_block, blocks, time.monotonic(), sources))

    def expect(self, ticket: Ticket) -> None:
        """It will be admitted once there is room; its senders are told so meanwhile. Ended by `admit` or `dismiss`."""
        with self._lock:
            self._inbound.expect(ticket)

    def dismiss(self, ticket: Ticket, error: TercetError) -> None:
        with self._lock:
            self._run(self._inbound.dismiss(ticket, error))

    def progress(self) -> int:
        """Grows as tickets advance, here or at their senders."""
        return self._inbound.progress

    def refuse(self, ticket: Ticket, reason: str) -> None:
        with self._lock:
            self._run(self._inbound.refuse(ticket, reason))

    def cancel(self, ticket: Ticket, error: TercetError) -> None:
        with self._lock:
            self._run(self._inbound.cancel(ticket, error))

    def live(self) -> list[Ticket]:
        with self._lock:
            return self._inbound.live()

    def dropped(self) -> Counter[str]:
        with self._lock:
            return Counter(self._inbound.dropped)

    def corrupt(self) -> int:
        """Units that landed with a wrong digest, and were asked for again."""
        return self._inbound.corrupt

    def refused(self) -> Counter[str]:
        """Error code -> connections turned away or cut off for it."""
        return self._acceptor.refused()

    def stop(self) -> None:
        """Close every connection. Open tickets fail, and may never be quiet: there are none, or the process ends."""
        self._stopping.set()
        os.write(self._stop_write, b"x")
        self._acceptor.stop()
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.mailbox.finish(timeout=1.0)
            peer.shutdown()
        # A thread that is inside a library when the process ends would abort it: also one that drops the last tensor.
        join_all([self._ticking, *(peer.thread for peer in peers)], STOP_S)  # each joins those of its links
        os.close(self._stop_write)  # so the read end is readable for threads that still wait for a death
        if not self._peers:
            os.close(self._stop_read)

    # ---- handshakes

    def _serve(self, channel: Channel, hello: Hello) -> None:
        (self._serve_link if hello.pair else self._serve_control)(channel, hello)

    def _transport_of(self, hello: Hello, channel: Channel) -> Transport:
        transport = self._transports.get(hello.transport)
        if transport is None:
            raise PeerMismatch(f"no transport {hello.transport!r} here, only {', '.join(self._transports)}")
        if channel.is_local != transport.one_host:
            came = "a Unix socket" if channel.is_local else "TCP"
            raise PeerMismatch(f"{transport.name} does not come over {came}")
        return transport

    def _welcome(self, peer_id: str, blob: bytes, hello: Hello) -> Welcome:
        layout: list[object] = list(astuple(self._region.layout))
        welcome = Welcome(self._config.worker_id, self._epoch, layout, peer_id, blob)
        return proof.signed(welcome, self._config.token, hello.nonce)

    # ---- the control link

    def _serve_control(self, channel: Channel, hello: Hello) -> None:
        transport = self._transport_of(hello, channel)
        if transport.one_host:
            os.close(vet_unix(channel.sock))
        tune_tcp(channel.sock)
        pair = pair_of(hello.layout, self._region.layout, transport, self._config.convert)
        peer = PrefillPeer(transport, channel, Terms(pair, transport.one_sided, transport.fenceable), hello.worker_id)
        with self._lock:
            self._peers[peer.id] = peer
            for gone in hello.quiet:
                if gone in self._peers:
                    os.eventfd_write(self._peers[gone].quiet_fd, 1)
        try:
            channel.send(self._welcome(peer.id, b"", hello))
            channel.settimeout(None)
            self._read_messages(peer)
        except (PeerDown, ProtocolViolation) as error:
            if isinstance(error, ProtocolViolation):
                self._acceptor.count_refused(error.code())
        finally:
            self._end(peer)

    def _read_messages(self, peer: PrefillPeer) -> None:
        while True:
            message, payload = peer.channel.receive()
            if payload:
                raise ProtocolViolation("a control link carries no payload")
            peer.said_goodbye = peer.said_goodbye or isinstance(message, Goodbye)
            self._take(peer, message)

    def _take(self, peer: PrefillPeer, message: Message) -> None:
        with self._lock:
            self._run(self._inbound.on_message(peer, peer.terms, message, time.monotonic()))

    def _end(self, peer: PrefillPeer) -> None:
        """The pair is over: fail its tickets, then free their blocks as soon as nothing can land any more."""
        with self._lock:
            peer.over = True  # no link joins it now
        peer.shutdown()
        peer.mailbox.finish(timeout=1.0)
        for link in peer.links:
            link.thread.join()
        with self._lock:
            self._run(self._inbound.peer_down(peer))
        fenced = [link.inlet.fence() for link in peer.links]
        if all(fenced) or peer.said_goodbye or peer.await_end(self._stop_read):
            with self._lock:
                self._run(self._inbound.peer_dead(peer))
        with self._lock:
            del self._peers[peer.id]
        peer.close()

    # ---- data links

    def _serve_link(self, channel: Channel, hello: Hello) -> None:
        transport = self._transport_of(hello, channel)
        with self._lock:
            peer = self._peers.get(hello.pair)
        if peer is None or peer.transport is not transport:
            raise PeerMismatch("a data link of no pair that is known here")
        tune_tcp(channel.sock)
        lander = lander_of(self._region, self._config.integrity)
        inlet = transport.inlet(LinkContext(channel, self._region, self._config.lease_s))
        link = Link(channel, inlet, lander, threading.current_thread())
        with self._lock:
            joined = not peer.over
            if joined:
                peer.links.append(link)
        if not joined:
            inlet.fence()
            if inlet.death_fd is not None:
                os.close(inlet.death_fd)
            raise PeerDown("the pair is over already")
        try:
            channel.send(self._welcome(peer.id, inlet.blob, hello), fds=inlet.fds)
            inlet.connected()
            channel.settimeout(None)
            self._read_data(peer, link)
        except ProtocolViolation as error:
            self._acceptor.count_refused(error.code())
        except PeerDown:
            pass  # `_end` reports it
        finally:
            peer.shutdown()

    def _read_data(self, peer: PrefillPeer, link: Link) -> None:
        while True:
            message, payload = link.channel.receive()
            if isinstance(message, Probe):
                self._land_probe(link, message, payload)
            elif isinstance(message, Data):
                self._land(peer, link, message, payload)
            elif isinstance(message, Written):
                self._take(peer, message)
            else:
                raise ProtocolViolation(f"{type(message).__name__} on a data link")

    def _land_probe(self, link: Link, probe: Probe, payload: int) -> None:
        if probe.num_bytes > SCRATCH:
            raise ProtocolViolation(f"a probe of {probe.num_bytes} bytes is over the limit of {SCRATCH}")
        link.inlet.land(link.channel, payload, self._region.scratch(probe.num_bytes))
        link.channel.send(ProbeAck(probe.num_bytes))

    def _land(self, peer: PrefillPeer, link: Link, data: Data, payload: int) -> None:
        with self._lock:
            landing = self._inbound.begin_landing(peer, data)
        if landing is None:
            self._pass_over(peer, link, data, payload)
            return
        good: NDArray[np.bool_] | None = None
        try:
            good = link.lander.land(peer.terms, link.inlet, link.channel, data, payload, landing)
        finally:
            with self._lock:
                self._run(self._inbound.end_landing(peer, data, good, time.monotonic()))

    def _pass_over(self, peer: PrefillPeer, link: Link, data: Data, payload: int) -> None:
        """Skip bytes that must not be placed, whether they come on the channel or through the transport's library."""
        num_bytes = data.layers * data.count * peer.terms.pair.unit_bytes
        if num_bytes > self._region.layout.total_bytes:
            raise ProtocolViolation(f"DATA of {num_bytes} bytes is more than a whole cache")
        link.inlet.pass_over(link.channel, payload, num_bytes)

    # ---- time

    def _clock(self) -> None:
        while not self._stopping.wait(self._config.heartbeat_s):
            with self._lock:
                self._run(self._inbound.tick(time.monotonic()))
                self._run(self._inbound.heartbeats())

    def _run(self, effects: Sequence[InboundEffect]) -> None:
        """Carry effects out, in order; the lock is held."""
        for effect in effects:
            if isinstance(effect, Send):
                assert isinstance(effect.peer, PrefillPeer)
                effect.peer.mailbox.post(effect.message)
            elif isinstance(effect, Cut):
                assert isinstance(effect.peer, PrefillPeer)
                effect.peer.shutdown()
            else:
                self._on_event(effect)
