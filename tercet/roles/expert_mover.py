"""One rank's part in moving experts between the ranks of a group while they compute. Rank 0 says what to do
(migration.py), for one layer after the other:

    begin ─> stage: a second set of the layer's experts, of what is here ─> take, give: what comes from other ranks
                                                                        ─> commit: behind a step, the new set
                                                                        ─> drop: the old one stays
          ─> end
    share: which replicas its rows take from now on

The weights in use are never written, so a layer that does not get ready leaves no trace. Moves are numbered: what is
said for one that is over is refused. Weights go by the mover of `transfer/`, from memory to memory of the two ranks,
with its leases and digests (expert_links.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tercet.distributed.expert_map import ExpertMap
from tercet.errors import ClusterError, InternalError
from tercet.kernels.moe import Experts
from tercet.models.transformer import Transformer
from tercet.roles.expert_links import ExpertLinks
from tercet.roles.part import Identity

MOVES = ("begin", "stage", "take", "give", "share", "drop", "end")  # what rank 0 asks for
STEP_S = 30.0  # for the steps that rank 0 has sent before to end
QUIET_S = 5.0  # for what was cancelled to be written no more
MOST_KEPT = 4  # moves whose memory a peer may still write to
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
    links: ExpertLinks | None  # None: no layer of this rank has experts
    staged: _Staged | None = None


class ExpertMover:
    """For threads that answer rank 0. `take` and `give` may run at once, and a late `share`; all else one by one."""

    def __init__(self, who: Identity, rank: int, model: Transformer, fingerprint: str) -> None:
        assert model.ranks.spread is not None, "its experts are not spread"
        self._who, self._rank, self._model, self._fingerprint = who, rank, model, fingerprint
        self._spread = model.ranks.spread
        self._move: _Move | None = None
        self._newest = 0  # number of a move
        self._shared = 0  # number of the move that last told shares
        self._kept: list[ExpertLinks] = []  # that a peer may still write by
        self._changing = threading.Lock()
        self._placed = threading.Condition()  # another placement is in use

    def do(self, verb: str, *fields: Any) -> Any:
        """verb: one of `MOVES`."""
        return getattr(self, verb)(*fields)

    def begin(self, move: int) -> tuple[str, int]:
        """-> where its receiver listens, and for how many experts there is room. Ends an earlier move. Raises
        ClusterError, SpecError, and PeerMismatch later on if other ranks keep weights otherwise."""
        self._newest = max(self._newest, move)
        self._take_out(lambda current: current.number < move)
        self._kept = [links for links in self._kept if not links.close(0.0)]
        if len(self._kept) >= MOST_KEPT:
            raise ClusterError(f"rank {self._rank}: peers may still write experts of {MOST_KEPT} earlier moves here")
        some = next(iter(self._model.mixtures.values()), None)
        links = None if some is None else ExpertLinks(self._who, self._rank, self._fingerprint, some.experts)
        with self._changing:
            late = move < self._newest
            if not late:
                self._move = _Move(move, links)
        if late:
            self._close(links)
            raise ClusterError(f"rank {self._rank}: move {move} of experts is over")
        return ("", 0) if links is None else (links.endpoint, links.room)

    def stage(self, move: int, epoch: int, layer: int, row: Sequence[int]) -> None:
        """row: phy2log [P] of the layer from its switch on; epoch: of the placement until then. Raises ClusterError."""
        current, spread = self._of(move), self._spread
        self._until(epoch)
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
        """What comes under this name goes into these slots of the staged layer. -> bytes. Raises as
        `ExpertLinks.take`."""
        current = self._of(move)
        staged = current.staged
        if current.links is None or staged is None or staged.layer != layer or staged.experts is None:
            raise ClusterError(f"rank {self._rank}: layer {layer} is not being placed anew")
        with torch.inference_mode():
            num_bytes = current.links.take(name, [_of_slot(staged.experts, slot) for slot in slots], timeout_s)
        staged.missing -= set(slots)
        return num_bytes

    def give(
        self, move: int, name: str, epoch: int, endpoint: str, layer: int, slots: Sequence[int], timeout_s: float
    ) -> None:
        """The weights in these slots of the layer, as it is now, to the receiver there. Raises as
        `ExpertLinks.give`."""
        links, experts = self._of(move).links, self._model.mixtures[layer].experts
        assert links is not None, "it has a layer with experts"
        with torch.inference_mode():
            links.give(name, epoch, endpoint, [_of_slot(experts, slot) for slot in slots], timeout_s)

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

    def share(self, move: int, epoch: int, shares: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> None:
        """As `Spread.share`, once this rank is at that placement, and if no later move has told others. Raises
        ClusterError."""
        self._until(epoch)
        with self._changing:
            if move < self._shared:
                raise ClusterError(f"rank {self._rank}: move {move} of experts is over")
            self._shared = move
            self._spread.share(epoch, dict(shares))

    def drop(self, move: int) -> None:
        """The layer that is staged is not to be used; what waits for weights of it ends."""
        current = self._of(move)
        current.staged = None
        if current.links is not None:
            current.links.cancel()

    def end(self, move: int) -> None:
        """Give back what the move took. Of one that is over already: nothing."""
        self._take_out(lambda current: current.number == move)

    def close(self) -> None:
        self._take_out(lambda current: True)

    # ---- within

    def _until(self, epoch: int) -> None:
        """This rank may be some steps behind rank 0. Raises ClusterError."""
        with self._placed:
            if not self._placed.wait_for(lambda: self._spread.epoch == epoch, STEP_S):
                raise ClusterError(f"rank {self._rank} is at placement {self._spread.epoch}, not {epoch}")

    def _take_out(self, which: Callable[[_Move], bool]) -> None:
        with self._changing:
            current = self._move
            if current is None or not which(current):
                return
            self._move = None
        self._close(current.links)

    def _close(self, links: ExpertLinks | None) -> None:
        if links is not None and not links.close(QUIET_S):
            log.warning("rank %d keeps memory for experts until no peer can write to it", self._rank)
            self._kept.append(links)

    def _of(self, move: int) -> _Move:
        current = self._move
        if current is None or current.number != move:
            raise ClusterError(f"rank {self._rank}: move {move} of experts is over")
        return current


def _of_slot(experts: Experts, slot: int) -> list[Tensor]:
    return [weight[slot] for weight in experts.weights]


def _copy(source: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for here, there in zip(source, into, strict=True):
        there.copy_(here)
