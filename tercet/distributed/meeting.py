"""Where ranks of a direct exchange link up: each listens, and dials others. Both ends prove that they know the secret.

The handshake is the KV mover's (`transfer/protocol/proof.py`): CHALLENGE, HELLO, WELCOME. What the ranks must agree on
stands in place of a KV layout. Within a host links are Unix sockets, between hosts TCP.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass

from tercet import secret
from tercet.distributed.link import Link
from tercet.errors import PeerDown, PeerMismatch, ProtocolViolation, RankLost
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.wires import dial_tcp, dial_unix, host_id, tune_tcp
from tercet.transfer.mover.acceptor import Acceptor
from tercet.transfer.protocol import proof
from tercet.transfer.protocol.messages import VERSION, Hello, Refuse, Welcome
from tercet.transfer.transports.contract import HANDSHAKE_S, Endpoint, MoverConfig, accept_challenge

TRANSPORT = "experts"  # named in a HELLO, so that no KV mover takes this for one of its own


@dataclass(frozen=True)
class Group:
    """What all ranks of an exchange agree on."""

    name: str  # of the model and the group of ranks that serves it
    token: str  # the cluster's secret
    size: int
    slots_per_rank: int


class Meeting:
    """Any thread."""

    def __init__(self, group: Group, rank: int, host: str = "127.0.0.1") -> None:
        """host: the address to listen on for ranks of other hosts."""
        self.group, self.rank = group, rank
        self._changed = threading.Condition()
        self._arrived: dict[int, Link] = {}  # rank -> link that no one has asked for yet
        self._given_up: set[int] = set()  # ranks that nobody waits for
        self._host_id = host_id()
        config = MoverConfig(str(rank), group.name, group.token, HANDSHAKE_S, HANDSHAKE_S, integrity=False)
        self._acceptor = Acceptor(config, self._serve)
        unix, tcp = self._acceptor.listen(host)
        self.endpoint = Endpoint(str(rank), 0, self._host_id, unix, tcp, [TRANSPORT]).encode()

    def dial(self, rank: int, endpoint: str) -> Link:
        """Raises RankLost if it cannot be reached, PeerMismatch if it is another rank or of another group."""
        try:
            channel = Channel(self._socket(Endpoint.decode(endpoint)))
            try:
                channel.settimeout(HANDSHAKE_S)
                self._greet(channel, rank)
            except BaseException:
                channel.close()
                raise
        except PeerMismatch as error:
            raise PeerMismatch(f"rank {rank}: {error}") from error
        except (PeerDown, OSError) as error:
            raise RankLost(f"rank {rank} cannot be reached: {error}", rank) from error
        return Link(rank, channel)

    def arrival(self, rank: int, timeout_s: float) -> Link:
        """The link on which this rank has dialled. Raises RankLost if it does not in time, or is given up."""
        with self._changed:
            if not self._changed.wait_for(lambda: rank in self._arrived or rank in self._given_up, timeout_s):
                raise RankLost(f"rank {rank} did not link up with rank {self.rank} within {timeout_s:g} s", rank)
            if rank in self._given_up:
                raise RankLost(f"rank {rank} is lost, and was to link up with rank {self.rank}", rank)
            return self._arrived.pop(rank)

    def give_up(self, rank: int) -> None:
        """Nobody waits for it, until it dials again."""
        with self._changed:
            self._given_up.add(rank)
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept no more links. Those that stand are their owners'."""
        self._acceptor.stop()
        with self._changed:
            for link in self._arrived.values():
                link.close()
            self._arrived.clear()

    def _socket(self, endpoint: Endpoint) -> socket.socket:
        if endpoint.host_id == self._host_id:
            return dial_unix(endpoint.unix, HANDSHAKE_S)
        return dial_tcp(endpoint.tcp[0], HANDSHAKE_S)

    def _greet(self, channel: Channel, rank: int) -> None:
        """The dialling end's handshake."""
        challenge, ours = accept_challenge(channel.receive()[0]), secret.nonce()
        name, token = str(self.rank), self.group.token
        bare = Hello(VERSION, name, self.group.name, self._shape(), TRANSPORT, "", [], ours)
        channel.send(proof.signed(bare, token, challenge))
        match channel.receive()[0]:
            case Welcome() as welcome:
                proof.check(welcome, token, ours)
                self._check(welcome.worker_id, welcome.layout, rank)
            case Refuse(code, reason):
                raise PeerMismatch(f"it refused the link: {code}: {reason}")
            case other:
                raise ProtocolViolation(f"expected WELCOME, got {type(other).__name__}")

    def _serve(self, channel: Channel, hello: Hello) -> None:
        """The listening end's handshake; the acceptor has checked the proof and the group. It closes the link when
        this returns, so that is at its end."""
        ranks = {str(rank): rank for rank in range(self.group.size) if rank != self.rank}
        if hello.transport != TRANSPORT or hello.worker_id not in ranks:
            raise PeerMismatch(f"{hello.transport} of {hello.worker_id} is no link to rank {self.rank}")
        rank = ranks[hello.worker_id]
        self._check(hello.worker_id, hello.layout, rank)
        with self._changed:  # before it knows that it is welcome: from then on it may be waited for
            self._given_up.discard(rank)
        welcome = Welcome(str(self.rank), 0, self._shape(), "", b"")
        channel.send(proof.signed(welcome, self.group.token, hello.nonce))
        tune_tcp(channel.sock)
        link = Link(rank, channel)
        with self._changed:
            if rank in self._arrived:
                self._arrived[rank].close()
            self._arrived[rank] = link
            self._changed.notify_all()
        link.ended.wait()

    def _shape(self) -> list[object]:
        return [self.group.size, self.group.slots_per_rank]

    def _check(self, name: str, shape: list[object], rank: int) -> None:
        if name != str(rank):
            raise PeerMismatch(f"it is rank {name}")
        if shape != self._shape():
            raise PeerMismatch(f"ranks and slots per rank are {shape} there, {self._shape()} here")
