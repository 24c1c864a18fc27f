"""One rank's part in moving experts between the ranks of a group while they compute. Rank 0 says what to do
(migration.py), for one layer after the other:

    begin ─> stage: a second set of the layer's experts, of what is here ─> take, give: what comes from other ranks
                                                                        ─> commit: behind a step, the new set
                                                                        ─> drop: the old one stays
          ─> end

The weights in use are never written, so a layer that does not get ready leaves no trace. Moves are numbered: what is
said for one that is over is refused. Weights go by the mover of `transfer/`, from memory to memory of the two ranks,
with its leases and digests.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tercet.core import Ticket
from tercet.distributed.expert_map import ExpertMap
from tercet.errors import Cancelled, ClusterError, DeadlineExceeded, InternalError, TercetError
from tercet.kernels.moe import Experts
from tercet.models.transformer import Transformer
from tercet.roles.expert_staging import ExpertStaging, format_of
from tercet.roles.part import Identity
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import (
    Complete,
    Granted,
    OpDone,
    Quiesced,
    ReceiveEvent,
    ReceiveFailed,
    SendEvent,
    SendFailed,
)
from tercet.transfer.transports.table import AUTO, in_device_memory, usable

MOVES = ("begin", "stage", "take", "give", "drop", "end")  # what rank 0 asks for
STEP_S = 30.0  # for the steps that rank 0 has sent before to end
QUIET_S = 5.0  # for what was cancelled to be written no more
log = logging.getLogger(__name__)


@dataclass
class _Staged:
    """A layer that is being placed anew."""

    layer: int
    map: ExpertMap
    experts: Experts | None  # of this rank's slots; None: it has none of this layer
    missing: set[int]  # slots whose weights have not come


@dataclass
class _Move:
    number: int
    sender: KvSender
    receiver: KvReceiver
    out: ExpertStaging
    into: ExpertStaging
    endpoint: str
    staged: _Staged | None = None
    facts: dict[Ticket, queue.SimpleQueue[Any]] = field(default_factory=dict)
    noisy: set[Ticket] = field(default_factory=set)  # that failed, and may still be written

    def close(self) -> None:
        self.sender.stop()
        self.receiver.stop()
        if not self.noisy:
            self.out.memory.close()
            self.into.memory.close()


class ExpertMover:
    """For threads that answer rank 0. `take` and `give` may run at once; all else one by one."""

    def __init__(self, who: Identity, rank: int, model: Transformer, fingerprint: str) -> None:
        assert model.ranks.spread is not None, "its experts are not spread"
        self._who, self._rank, self._model, self._fingerprint = who, rank, model, fingerprint
        self._spread = model.ranks.spread
        self._move: _Move | None = None
        self._newest = 0  # number of a move
        self._kept: list[_Move] = []  # memory that a peer may still write to
        self._changing = threading.Lock()
        self._placed = threading.Condition()  # another placement is in use

    def do(self, verb: str, *fields: Any) -> Any:
        """verb: one of `MOVES`."""
        return getattr(self, verb)(*fields)

    def begin(self, move: int) -> tuple[str, int]:
        """-> where its receiver listens, and for how many experts there is room. Ends an earlier move. Raises
        ClusterError, SpecError, and PeerMismatch later on if weights have other formats at other ranks."""
        self._end_any()
        self._newest = max(self._newest, move)
        if self._kept:
            raise ClusterError(f"rank {self._rank}: a peer may still write experts of an earlier move here")
        mixtures = self._model.mixtures
        if not mixtures:
            return "", 0
        some = next(iter(mixtures.values())).experts
        wanted = self._who.spec.transfer.transport
        transports = usable(AUTO if in_device_memory(wanted) else wanted)  # staging is in the host's memory
        config = replace(
            self._who.mover_config(f"{self._fingerprint} {format_of(some)}"),
            worker_id=f"{self._who.worker_id}-experts-{self._rank}",
        )
        facts: dict[Ticket, queue.SimpleQueue[Any]] = {}

        def on_event(event: SendEvent | ReceiveEvent) -> None:
            if (heard := facts.get(event.ticket)) is not None:
                heard.put(event)

        out, into = ExpertStaging(some), ExpertStaging(some)
        receiver = KvReceiver(config, self._who.epoch, into.memory, transports, on_event)
        sender = KvSender(config, out.memory, transports, on_event)
        endpoint = receiver.start(self._who.host).encode()
        made = _Move(move, sender, receiver, out, into, endpoint, facts=facts)
        with self._changing:
            late = move < self._newest
            if not late:
                self._move = made
        if late:
            made.close()
            raise ClusterError(f"rank {self._rank}: move {move} of experts is over")
        return endpoint, into.room

    def stage(self, move: int, epoch: int, layer: int, row: Sequence[int]) -> None:
        """row: phy2log [P] of the layer from its switch on; epoch: of the placement until then. Raises ClusterError."""
        current, spread = self._of(move), self._spread
        with self._placed:  # this rank may be some steps behind
            if not self._placed.wait_for(lambda: spread.epoch == epoch, STEP_S):
                raise ClusterError(f"rank {self._rank} is at placement {spread.epoch}, not {epoch}")
        placed = spread.map.with_rows({layer: torch.tensor(row)}, self._model.config.num_layers)
        mixture = self._model.mixtures.get(layer)
        if mixture is None:
            current.staged = _Staged(layer, placed, None, set())
            return
        held, wanted = (experts.experts_on(spread.rank, layer) for experts in (spread.map, placed))
        if held == wanted:
            current.staged = _Staged(layer, placed, mixture.experts, set())
            return
        experts, missing = mixture.experts.empty(), set[int]()
        with torch.inference_mode():
            for slot, expert in enumerate(wanted):
                if expert in held:
                    _copy(_of_slot(mixture.experts, held.index(expert)), _of_slot(experts, slot))
                else:
                    missing.add(slot)
        current.staged = _Staged(layer, placed, experts, missing)

    def take(self, move: int, name: str, layer: int, slots: Sequence[int], timeout_s: float) -> int:
        """What comes under this name goes into these slots of the staged layer. -> bytes. Raises TransferError."""
        current, deadline = self._of(move), time.monotonic() + timeout_s
        staged, ticket = self._staged(current, layer), Ticket(name, 0, self._who.epoch)
        facts = current.facts[ticket] = queue.SimpleQueue()
        current.receiver.admit(ticket, 0, current.into.blocks(len(slots)))
        while True:
            match self._next(current, ticket, deadline, current.receiver.cancel):
                case Complete(_, num_bytes, _):
                    break
                case ReceiveFailed(_, error):
                    current.noisy.add(ticket)
                    raise error
        del facts, current.facts[ticket]
        assert staged.experts is not None, "this rank has slots of the layer"
        with torch.inference_mode():
            for place, slot in enumerate(slots):
                current.into.read(place, _of_slot(staged.experts, slot))
        staged.missing -= set(slots)
        return num_bytes

    def give(
        self, move: int, name: str, epoch: int, endpoint: str, layer: int, slots: Sequence[int], timeout_s: float
    ) -> None:
        """The weights in these slots of the layer, as it is now, to the receiver there. Raises TransferError."""
        current, deadline = self._of(move), time.monotonic() + timeout_s
        experts, ticket = self._model.mixtures[layer].experts, Ticket(name, 0, epoch)
        with torch.inference_mode():
            for place, slot in enumerate(slots):
                current.out.write(place, _of_slot(experts, slot))
        current.facts[ticket], failed = queue.SimpleQueue(), None
        blocks = current.out.blocks(len(slots))
        current.sender.open(ticket, endpoint, len(blocks), deadline)
        while True:
            match self._next(current, ticket, deadline, current.sender.cancel):
                case Granted():
                    current.sender.push(ticket, 0, 0, blocks)
                    current.sender.finish(ticket, b"")
                case SendFailed(_, error):
                    failed = error
                case OpDone():
                    break
        del current.facts[ticket]
        if failed is not None:
            raise failed

    def commit(self, move: int, layer: int, epoch: int) -> Callable[[], None]:
        """The staged layer is to be used. -> what puts it in place, which all ranks call behind the same step. It
        raises InternalError if this rank cannot, and then it cannot go on. epoch: of the placement from then on."""
        current, staged = self._move, None
        if current is not None and current.number == move:
            staged, current.staged = current.staged, None

        def put() -> None:
            if staged is None or staged.layer != layer or staged.missing or epoch != self._spread.epoch + 1:
                raise InternalError(f"rank {self._rank} has not got ready layer {layer} for placement {epoch}")
            if staged.experts is not None:
                self._model.mixtures[layer].experts = staged.experts
            with self._placed:
                self._spread.place_anew(staged.map, layer)
                self._placed.notify_all()

        return put

    def drop(self, move: int) -> None:
        """The layer that is staged is not to be used; what waits for weights of it ends."""
        current = self._of(move)
        current.staged = None
        for ticket in [*current.facts]:
            gone = Cancelled("this move of experts was given up")
            current.sender.cancel(ticket, gone)
            current.receiver.cancel(ticket, gone)

    def end(self, move: int) -> None:
        """Give back what the move took. Of one that is over already: nothing."""
        if self._move is not None and self._move.number == move:
            self._end_any()

    def close(self) -> None:
        self._end_any()

    # ---- within

    def _end_any(self) -> None:
        with self._changing:
            current, self._move = self._move, None
        if current is None:
            return
        deadline = time.monotonic() + QUIET_S
        for ticket in [*current.noisy]:
            facts = current.facts.get(ticket)
            while facts is not None and time.monotonic() < deadline:
                try:
                    if isinstance(facts.get(timeout=max(0.0, deadline - time.monotonic())), Quiesced | OpDone):
                        current.noisy.discard(ticket)
                        break
                except queue.Empty:
                    break
        current.close()
        if current.noisy:
            log.error("rank %d keeps memory for experts that a peer may still write to", self._rank)
            self._kept.append(current)

    def _of(self, move: int) -> _Move:
        current = self._move
        if current is None or current.number != move:
            raise ClusterError(f"rank {self._rank}: move {move} of experts is over")
        return current

    def _staged(self, current: _Move, layer: int) -> _Staged:
        if current.staged is None or current.staged.layer != layer:
            raise ClusterError(f"rank {self._rank}: layer {layer} is not being placed anew")
        return current.staged

    def _next(
        self, current: _Move, ticket: Ticket, deadline: float, cancel: Callable[[Ticket, TercetError], None]
    ) -> Any:
        """The next fact of a ticket. Raises DeadlineExceeded, after which there are none."""
        try:
            return current.facts[ticket].get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            current.noisy.add(ticket)
            late = DeadlineExceeded(f"rank {self._rank}: {ticket.request_id} did not end in time")
            cancel(ticket, late)
            raise late from None


def _of_slot(experts: Experts, slot: int) -> list[Tensor]:
    return [weight[slot] for weight in experts.weights]


def _copy(source: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for here, there in zip(source, into, strict=True):
        there.copy_(here)
