"""Experts that are spread over the ranks of a stage: which slots are here, and how tokens get to the others."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tercet.distributed.collectives import Traffic
from tercet.distributed.direct_exchange import DirectExchange
from tercet.distributed.exchange import Exchange
from tercet.distributed.expert_map import ExpertMap
from tercet.distributed.place import Place, share
from tercet.errors import ClusterError
from tercet.kernels.moe import ELSEWHERE, Experts


class Spread:
    def __init__(self, place: Place, experts: ExpertMap, exchange: Exchange, epoch: int = 0) -> None:
        """epoch: of the placement: how many times a layer was placed anew since the group started."""
        self.map, self.exchange = experts, exchange
        self.epoch = epoch
        self.rank = place.rank - place.stage_group.start  # within the stage
        self._computed: dict[int, Tensor] = {}  # layer -> rows of each slot, int64; last: ELSEWHERE
        self._before: dict[int, Tensor] = {}  # layer -> rows of each expert, int64, before it was placed anew
        self._counting = threading.Lock()  # reading what was computed, and placing anew
        self._turns = Counter[int]()  # layer -> batches so far
        self.traffic = Traffic()  # of dispatches and combines
        self._place = place

    def computed(self, layers: Sequence[int]) -> Tensor:
        """-> [layers, n] int64, rows that this rank has computed of each expert. Any thread."""
        with self._counting:
            return torch.stack([self._of_experts(layer) for layer in layers])

    def _of_experts(self, layer: int) -> Tensor:
        sums = self._before.get(layer, torch.zeros(self.map.experts, dtype=torch.int64)).clone()
        if layer in self._computed:
            sums.index_add_(0, torch.tensor(self.map.experts_on(self.rank, layer)), self._computed[layer][:-1])
        return sums

    def place_anew(self, experts: ExpertMap, layer: int) -> None:
        """Go by this map from now on; it differs in this layer. Between two steps, at all ranks behind the same."""
        with self._counting:
            self._before[layer] = self._of_experts(layer)
            self._computed.pop(layer, None)
            self.map = experts
            self.epoch += 1

    def share(self, epoch: int, shares: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """Rows of this rank take replicas by these shares from now on, layer -> [nodes, P]; epoch: of the placement
        that they are for. Whichever replica a row takes, its result is the same, so ranks need not begin at once. Any
        thread. Raises ClusterError."""
        with self._counting:
            if self.epoch != epoch:
                raise ClusterError(f"shares are for placement {epoch}, and rank {self.rank} is at {self.epoch}")
            self.map = self.map.with_shares(shares)

    def survives(self, ranks: Collection[int]) -> bool:
        """Whether the others go on without these: the exchange can, and each expert lies on one of the others, too."""
        if not isinstance(self.exchange, DirectExchange) or self.rank in ranks:
            return False
        return self.map.survives(ranks)

    def cut(self, rank: int) -> None:
        """It is lost: who waits for it in an exchange hears that at once. Any thread."""
        self._direct.cut(rank)

    def cut_all(self) -> None:
        """The group is broken: nobody is to wait. Any thread."""
        if isinstance(self.exchange, DirectExchange):
            for rank in range(self.map.ranks):
                self.exchange.cut(rank)

    def without(self, rank: int, attempt: int) -> None:
        """Go on without it, as every other rank does under the same number of attempt. Between two steps."""
        self._direct.without([rank])
        self._direct.resume(attempt, 0)

    def rejoin(self, rank: int, endpoint: str, attempt: int) -> None:
        """Take it back, which waits for that in `join`. Between two steps. Raises RankLost."""
        try:
            self._direct.rejoin(rank, endpoint)
        finally:  # the others are at this attempt
            self._direct.resume(attempt, 0)

    def join(self, ranks: Sequence[int], attempt: int) -> None:
        """Come back to these ranks. Raises RankLost."""
        try:
            self._direct.join(ranks)
        finally:
            self._direct.resume(attempt, 0)

    @property
    def _direct(self) -> DirectExchange:
        assert isinstance(self.exchange, DirectExchange), "no other exchange goes on without a rank"
        return self.exchange

    def forward(self, here: Experts, layer: int, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """here: the experts of this rank's slots; layer: of the model. x [T, E], experts and weights [T, k] as
        `Experts.forward` takes them -> [T, E]. Tensor ranks have the same rows: each sends its share of them, and has
        zeros for the others, so that their sum is the result. Shares and replicas go by turns from batch to batch, else
        one rank would have most of the rows of small batches."""
        turn, tensor = self._turns[layer], self._place.tensor
        self._turns[layer] += 1
        rows = share(len(x), (self._place.tensor_rank + turn) % tensor, tensor)
        own = slice(rows.start, rows.stop)
        slots = self.map.choose(experts[own], self.rank, layer, self.exchange.active, turn)
        with self._timed():
            received, handle = self.exchange.dispatch(x[own], slots, weights[own].contiguous(), layer)
        self._count(layer, received.slots)
        computed = here.forward(received.x, received.slots, received.weights)
        with self._timed():
            made = self.exchange.combine(computed, handle)
        if tensor == 1:
            return made
        out = torch.zeros_like(x)
        out[own] = made
        return out

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began, before = time.monotonic(), self.exchange.sent
        yield
        self.traffic.add((self.exchange.sent - before).total, began)

    def _count(self, layer: int, slots: Tensor) -> None:
        if layer not in self._computed:
            self._computed[layer] = torch.zeros(self.map.slots_per_rank + 1, dtype=torch.int64)
        flat, sums = slots.flatten().cpu(), self._computed[layer]
        assert ELSEWHERE == -1, "it counts as the last bin"
        sums.index_add_(0, flat % len(sums), torch.ones_like(flat))
