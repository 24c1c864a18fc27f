"""What both halves of the handover ask the mover to do. Their other effects are facts (facts.py)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from tercet.transfer.protocol.messages import Message

PeerKey = Hashable  # a connection


@dataclass(frozen=True)
class Send:
    peer: PeerKey
    message: Message


@dataclass(frozen=True)
class Cut:
    """Close the connection: its peer is silent, and there is no other way to end what is under way on it."""

    peer: PeerKey
