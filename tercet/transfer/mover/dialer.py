"""The prefill side's handshakes: connect to a decode worker, open and measure the data links, choose the transport."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial

from tercet import secret
from tercet.core import PairState
from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, TransferError
from tercet.transfer.links.channel import Channel, Mailbox
from tercet.transfer.links.secured import secured, wrapped
from tercet.transfer.links.wires import dial_tcp, dial_unix, host_id
from tercet.transfer.memory.device import KvRegion
from tercet.transfer.memory.layout import Pair
from tercet.transfer.memory.region import SCRATCH
from tercet.transfer.protocol import proof
from tercet.transfer.protocol.messages import VERSION, Goodbye, Hello, Probe, ProbeAck
from tercet.transfer.transports.contract import (
    HANDSHAKE_S,
    Endpoint,
    LinkContext,
    MoverConfig,
    Outlet,
    Parcel,
    Transport,
    accept_challenge,
    accept_welcome,
    pair_of,
)

QUIET = 4096  # pairs that are over, of which their workers have yet to be told
MAX_QUIET = 64  # of them in one HELLO
PROBES = 5  # small ones per link, for the latency; the lowest counts
BULK_PROBES = 3  # of SCRATCH bytes each, on each link, for the bandwidth

log = logging.getLogger(__name__)


class DecodePeer:
    """One decode worker, connected."""

    def __init__(self, endpoint: str, transport: Transport, channel: Channel, pair: Pair, lock: threading.Lock) -> None:
        self.endpoint = endpoint
        self.transport = transport
        self.channel = channel
        self.pair = pair
        self.id = ""  # the decode worker's name for the pair
        self.worker_id = ""
        self.mailbox: Mailbox
        self.links: list[tuple[Channel, Outlet]] = []
        self.threads: list[threading.Thread] = []  # of the data links
        self.reader: threading.Thread  # of the control link; it ends behind them
        self.attested: PairState | None = None
        self.over = False
        self.changed = threading.Condition(lock)  # there may be something to write

    def shutdown(self) -> None:
        self.channel.shutdown()
        for channel, _ in self.links:
            channel.shutdown()

    def close(self) -> None:
        """Before its threads are started."""
        for _, outlet in self.links:
            outlet.close()
        with contextlib.suppress(PeerDown):  # then the next HELLO says so
            self.channel.send(Goodbye("this pair is not used"))
        self.shutdown()
        for channel, _ in self.links:
            channel.close()
        self.channel.close()


class Dialer:
    """Any thread."""

    def __init__(
        self, config: MoverConfig, region: KvRegion, transports: Sequence[Transport], lock: threading.Lock
    ) -> None:
        self._config = config
        self._region = region
        self._transports = tuple(transports)
        self._lock = lock  # the sender's, for its peers' conditions
        self._host_id = host_id()
        self._quiet: deque[tuple[str, str]] = deque(maxlen=QUIET)  # (endpoint, id) of pairs that are over

    def quiet(self, peer: DecodePeer) -> None:
        """Nothing of the pair will be written any more; the next HELLO to its worker says so."""
        if peer.id:
            self._quiet.append((peer.endpoint, peer.id))

    def dial(self, encoded: str) -> DecodePeer:
        """Connect by every transport that reaches, and keep the one with the highest measured bandwidth. If shared
        memory connects, no other is tried, since all others copy more. A transport that fails is logged."""
        endpoint = Endpoint.decode(encoded)
        made: list[DecodePeer] = []
        failures: list[TransferError] = []
        for transport in self._candidates(endpoint):
            try:
                made.append(self._dial_over(encoded, endpoint, transport))
            except TransferError as error:
                failures.append(error)
                log.warning("no %s to the decode worker at %s: %s", transport.name, endpoint.tcp, error)
            if made and transport.one_host:
                break
        if not made:
            raise failures[0]
        best = max(made, key=lambda peer: peer.attested.bandwidth if peer.attested else 0.0)
        for other in made:
            if other is not best:
                self.drop(other)
        return best

    def drop(self, peer: DecodePeer) -> None:
        """End a pair whose threads were never started."""
        peer.close()
        self.quiet(peer)

    def _dial_over(self, encoded: str, endpoint: Endpoint, transport: Transport) -> DecodePeer:
        channel = self._channel(transport, endpoint, 0)
        peer = DecodePeer(encoded, transport, channel, Pair(self._region.layout, self._region.layout), self._lock)
        try:
            self._greet(peer)
            for number in range(self._config.links or transport.links):
                self._join(peer, self._channel(transport, endpoint, number))
            peer.attested = self._attest(peer)
            for each in (channel, *(link for link, _ in peer.links)):
                each.settimeout(None)
        except (TransferError, OSError) as error:
            self.drop(peer)
            if isinstance(error, TransferError):
                raise
            raise PeerDown(f"the handshake with {endpoint.tcp} broke: {error}") from error
        return peer

    def _candidates(self, endpoint: Endpoint) -> list[Transport]:
        """Transports that both ends have and that reach the peer. Raises PeerMismatch if there is none."""
        near = endpoint.host_id == self._host_id
        found = [t for t in self._transports if t.name in endpoint.transports and (near or not t.one_host)]
        if not found:
            ours, where = [t.name for t in self._transports], "" if near else ", which is on another host"
            raise PeerMismatch(
                f"no transport reaches the decode worker{where}: {ours} here, {endpoint.transports} there"
            )
        return found

    def _channel(self, transport: Transport, endpoint: Endpoint, number: int) -> Channel:
        try:
            if transport.one_host:
                return Channel(dial_unix(endpoint.unix, HANDSHAKE_S))
            bare = dial_tcp(endpoint.tcp[number % len(endpoint.tcp)], HANDSHAKE_S)
            if (tls := self._config.tls) is None:
                return Channel(bare)
            return Channel(secured(wrapped(bare, tls, dialled=True), tls), over_tls=True)
        except OSError as error:  # this process has no descriptor left
            raise PeerDown(f"no transfer connection to {endpoint.worker_id}: {error}") from error

    def _greet(self, peer: DecodePeer) -> None:
        """The control link's handshake."""
        peer.channel.settimeout(HANDSHAKE_S)
        over = [each for each in list(self._quiet) if each[0] == peer.endpoint][-MAX_QUIET:]
        hello = self._hello(peer, peer.channel, [pair for _, pair in over])
        welcome = accept_welcome(peer.channel.receive()[0], self._config.token, hello.nonce)
        for each in over:  # the worker knows now
            with contextlib.suppress(ValueError):  # another connection has told it
                self._quiet.remove(each)
        peer.id, peer.worker_id = welcome.pair, welcome.worker_id
        peer.pair = pair_of(self._region.layout, welcome.layout, peer.transport, self._config.convert)

    def _join(self, peer: DecodePeer, channel: Channel) -> None:
        """A data link's handshake."""
        channel.settimeout(HANDSHAKE_S)
        try:
            hello = self._hello(peer, channel, ())
            message, fds = channel.receive_with_fds()
        except TransferError:
            channel.close()
            raise
        try:
            welcome = accept_welcome(message, self._config.token, hello.nonce)
            context = LinkContext(channel, self._region, self._config.lease_s, welcome.blob, fds)
            peer.links.append((channel, peer.transport.outlet(context)))
        except TransferError:
            channel.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _hello(self, peer: DecodePeer, channel: Channel, quiet: Sequence[str]) -> Hello:
        """Say who we are, in answer to the CHALLENGE."""
        config, layout = self._config, list[object](astuple(self._region.layout))
        challenge = accept_challenge(channel.receive()[0])
        name, ours = peer.transport.name, secret.nonce()
        bare = Hello(VERSION, config.worker_id, config.fingerprint, layout, name, peer.id, list(quiet), ours)
        hello = proof.signed(bare, config.token, challenge)
        channel.send(hello)
        return hello

    def _attest(self, peer: DecodePeer) -> PairState:
        """Measure the links, all at once since they may share a wire, by writes into the scratch behind the peer's
        cache."""
        latency = min(self._probe(peer, *link, 64) for link in peer.links for _ in range(PROBES))
        with ThreadPoolExecutor(len(peer.links)) as pool:
            for _ in range(2):  # the first touches the pages
                began = time.perf_counter()
                list(pool.map(partial(self._fill, peer), peer.links))
                seconds = time.perf_counter() - began
        num_bytes = len(peer.links) * BULK_PROBES * SCRATCH
        return PairState(peer.worker_id, peer.transport.name, num_bytes / seconds, latency)

    def _fill(self, peer: DecodePeer, link: tuple[Channel, Outlet]) -> None:
        for _ in range(BULK_PROBES):
            self._probe(peer, *link, SCRATCH)

    def _probe(self, peer: DecodePeer, channel: Channel, outlet: Outlet, num_bytes: int) -> float:
        run = (self._region.layout.total_bytes, peer.pair.dst.total_bytes, num_bytes)
        began = time.perf_counter()
        outlet.write(channel, Parcel(Probe(num_bytes), self._region.memory, [run]))
        answer, _ = channel.receive()
        if answer != ProbeAck(num_bytes):
            raise ProtocolViolation(f"expected PROBE_ACK, got {type(answer).__name__}")
        return time.perf_counter() - began
