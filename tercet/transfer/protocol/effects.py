"""What both halves of the handover ask the mover to do. Their other effects are facts, and each half has its own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from tercet.transfer.protocol.messages import Message

Peer = Hashable  # a connection


@dataclass(frozen=True)
class Send:
    peer: Peer
    message: Message
