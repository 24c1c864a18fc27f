"""Facts of a rank's mover on their way to rank 0: [name, ticket, *fields], an error as [code, message]."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from tercet.core import Ticket
from tercet.errors import ProtocolViolation, TercetError, from_wire
from tercet.transfer.protocol.facts import ReceiveEvent, SendEvent

KINDS = {kind.__name__: kind for kind in (*get_args(SendEvent), *get_args(ReceiveEvent))}


def packed_fact(event: SendEvent | ReceiveEvent) -> list[Any]:
    values = [getattr(event, field.name) for field in fields(event)]
    return [type(event).__name__, *(error_of(v) if isinstance(v, TercetError) else v for v in values)]


def fact_of(packed: list[Any]) -> Any:
    """Raises ProtocolViolation."""
    match packed:
        case [str(name), [str(), int(), int()] as ticket, *rest] if name in KINDS:
            values = [from_wire(*value) if isinstance(value, list) else value for value in rest]
            return KINDS[name](Ticket(*ticket), *values)
    raise ProtocolViolation(f"no fact of a mover: {packed!r:.80}")


def error_of(error: TercetError) -> list[str]:
    return [error.code(), str(error)]
