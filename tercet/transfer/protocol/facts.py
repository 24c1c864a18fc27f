"""What the two halves of the handover tell their workers. Each fact of a ticket is told once, in order."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.core import Ticket
from tercet.errors import TercetError

# ---- of the sending half


@dataclass(frozen=True)
class Granted:
    ticket: Ticket
    first_block: int  # source blocks before it need not be pushed


@dataclass(frozen=True)
class SendFailed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Released:
    ticket: Ticket
    num_bytes: int = 0  # that were written, without those that were asked for again


@dataclass(frozen=True)
class OpDone:
    """The source blocks may be reused. It always comes, and last."""

    ticket: Ticket


SendEvent = Granted | SendFailed | Released | OpDone

# ---- of the receiving half


@dataclass(frozen=True)
class Noted:
    """The note of the sending role has come; the KV may still be landing."""

    ticket: Ticket
    note: bytes


@dataclass(frozen=True)
class Complete:
    ticket: Ticket
    num_bytes: int
    transfer_s: float  # from the last push until the last byte had landed


@dataclass(frozen=True)
class ReceiveFailed:
    ticket: Ticket
    error: TercetError


@dataclass(frozen=True)
class Quiesced:
    """No write can land any more. verified: how many granted blocks, from the first on, are verified in all layers."""

    ticket: Ticket
    verified: int = 0


ReceiveEvent = Noted | Complete | ReceiveFailed | Quiesced
