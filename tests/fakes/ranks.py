"""What the movers of a group's ranks are asked and told, remembered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tercet.core import Ticket
from tercet.errors import TercetError


class FakeMover:
    """Rank 0's sender or receiver: remembers what it is told."""

    def __init__(self, on_event: Callable[[Any], None]) -> None:
        self.on_event, self.told = on_event, list[tuple[Any, ...]]()
        self.during_open: Callable[[], None] = lambda: None
        self.fault: TercetError | None = None

    def open(self, ticket: Ticket, endpoints: list[str], *_: object) -> str:
        if self.fault is not None:
            raise self.fault
        self.told.append(("open", ticket, len(endpoints)))
        self.during_open()
        return "shm"

    def connected(self, _: str) -> bool:
        return True

    def push(self, *_: object) -> None: ...

    def dropped(self) -> Counter[str]:
        return Counter(late=2)

    refused = dropped

    def corrupt(self) -> int:
        return 1

    def __getattr__(self, verb: str) -> Callable[..., None]:
        return lambda *fields: self.told.append((verb, *fields))


class FakeTalk:
    def __init__(self, rank: int) -> None:
        self.rank, self.told = rank, list[tuple[Any, ...]]()
        self.faults: dict[str, TercetError] = {}  # question -> what its answer raises
        self.during: Callable[[], None] = lambda: None

    def tell(self, *message: Any) -> None:
        self.told.append(message)

    def ask(self, kind: str, *fields: Any, timeout_s: float) -> str:
        if kind in self.faults:
            raise self.faults[kind]
        self.told.append((kind, *fields))
        self.during()
        return "tcp"
