"""How fast each transport moves KV within this machine, by a pair of movers in this process.

It is what `tercet status` shows of workers as they connect (`transfer/mover/dialer.py`), without any workers; between
machines only those can tell.
"""

from __future__ import annotations

import queue
import secrets

from tercet.core import PairState
from tercet.errors import TransferError
from tercet.tls import PeerTls
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import MoverConfig, Transport

LAYOUT = KvLayout(layers=1, blocks=8, block_size=16, kv_heads=2, head_dim=8, dtype="float32")
LEASE_S, HEARTBEAT_S = 10.0, 2.0


def measured(transport: Transport, tls: PeerTls | None = None) -> PairState:
    """Of a transport between hosts' memories, that is here. tls: of TCP. Raises TransferError."""
    token, events = secrets.token_hex(16), queue.SimpleQueue[object]()

    def config(name: str) -> MoverConfig:
        return MoverConfig(name, "doctor", token, LEASE_S, HEARTBEAT_S, integrity=True, tls=tls)

    source, destination = Region(LAYOUT), Region(LAYOUT)
    receiver = KvReceiver(config("to"), 1, destination, [transport], events.put)
    sender = KvSender(config("from"), source, [transport], events.put)
    try:
        sender.connect(receiver.start("127.0.0.1").encode())
        (pair,) = sender.attested()
    finally:
        sender.stop()
        receiver.stop()
        source.close()
        destination.close()
    if pair.fault:
        raise TransferError(pair.fault)
    return pair
