"""Where the experts of a model lie: physical slots on ranks, some experts in several of them (replicas).

L layers   n experts (logical)   P slots (physical) = ranks * slots_per_rank   R most replicas of an expert
T rows of the batch   k experts of a token

Slot s lies on rank s // slots_per_rank. The names phy2log and log2phy are those of DeepSeek's EPLB.
Shares say which replicas rows take (`placement.expert_shares`). A layer without them: a rank's own, else all by turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tercet.errors import ClusterError, InternalError, NoWorkers, SpecError
from tercet.placement.expert_shares import check_shares

NO_SLOT = -1  # pads the rows of log2phy


@dataclass(frozen=True)
class _Choice:
    """The replicas that one rank may choose from."""

    slots: Tensor  # [n, turns] int64, the replica of each turn first, then NO_SLOT
    counts: Tensor  # [n] int64, turns of each expert
    missing: bool  # some expert has none


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """phy2log [L, P] int64: the expert in each slot. L = 1: all layers have the same. shares: layer -> [nodes, P]
    int64, of the layers that have any."""

    phy2log: Tensor
    experts: int
    slots_per_rank: int
    shares: Mapping[int, Tensor] = field(default_factory=dict)
    _choices: dict[tuple[object, ...], _Choice] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ClusterError for a placement that is none."""
        shape, dtype = tuple(self.phy2log.shape), self.phy2log.dtype
        if len(shape) != 2 or not shape[0] or dtype != torch.int64:
            raise ClusterError(f"phy2log must be int64 of shape [layers, slots], not {dtype} of {list(shape)}")
        if self.slots_per_rank < 1 or not shape[1] or shape[1] % self.slots_per_rank:
            raise ClusterError(f"{shape[1]} slots are no multiple of {self.slots_per_rank} slots per rank")
        for layer, row in enumerate(self.phy2log):
            self._check_layer(layer, row)
        for layer, shares in self.shares.items():
            try:
                check_shares(self._row(layer).numpy(), shares.numpy(), self.ranks)
            except SpecError as error:
                raise ClusterError(f"layer {layer}: {error}") from error

    def _check_layer(self, layer: int, row: Tensor) -> None:
        strange = row[(row < 0) | (row >= self.experts)].tolist()
        if strange:
            raise ClusterError(f"layer {layer}: slots of experts {strange[:8]}; the model has {self.experts}")
        absent = sorted(set(range(self.experts)) - set(row.tolist()))
        if absent:
            raise ClusterError(f"layer {layer}: no slot holds experts {absent[:8]}; each needs at least one")

    def with_rows(self, rows: Mapping[int, Tensor], layers: int) -> ExpertMap:
        """The same, but for some layers (layer -> phy2log [P]), which have no shares then. layers: of the model. Raises
        ClusterError."""
        phy2log = self.phy2log.expand(layers, -1).clone()
        for layer, row in rows.items():
            phy2log[layer] = row
        shares = {layer: its for layer, its in self.shares.items() if layer not in rows}
        made = ExpertMap(phy2log, self.experts, self.slots_per_rank, shares)
        made._choices.update({key: its for key, its in self._choices.copy().items() if key[1] not in rows})
        return made

    def with_shares(self, shares: Mapping[int, Sequence[Sequence[int]]]) -> ExpertMap:
        """The same placement with these shares instead, layer -> [nodes, P]. Raises ClusterError."""
        given = {layer: torch.tensor(its, dtype=torch.int64) for layer, its in shares.items()}
        return ExpertMap(self.phy2log, self.experts, self.slots_per_rank, given)

    def told_shares(self) -> dict[int, list[list[int]]]:
        """As `with_shares` takes them."""
        return {layer: its.tolist() for layer, its in self.shares.items()}

    def survives(self, ranks: Collection[int]) -> bool:
        """Whether each expert lies on a rank that is none of these."""
        left = [rank for rank in range(self.ranks) if rank not in ranks]
        layers = range(len(self.phy2log))
        return all(
            len({expert for rank in left for expert in self.experts_on(rank, layer)}) == self.experts
            for layer in layers
        )

    @property
    def digest(self) -> str:
        """Of the placement: ranks must have the same one."""
        return hashlib.sha256(self.phy2log.contiguous().numpy().tobytes()).hexdigest()

    @property
    def ranks(self) -> int:
        return self.phy2log.shape[1] // self.slots_per_rank

    def experts_on(self, rank: int, layer: int = 0) -> list[int]:
        """The experts in this rank's slots, in their order."""
        first = rank * self.slots_per_rank
        held: list[int] = self._row(layer)[first : first + self.slots_per_rank].tolist()
        return held

    def log2phy(self, layer: int = 0) -> Tensor:
        """-> [n, R] int64, the slots of each expert in ascending order, padded with NO_SLOT."""
        return _slots_of(self._row(layer), torch.ones(self.phy2log.shape[1], dtype=torch.bool), self.experts)

    def choose(
        self, experts: Tensor, rank: int, layer: int = 0, active: tuple[bool, ...] | None = None, turn: int = 0
    ) -> Tensor:
        """experts [T, k] int64; rank: the one that the rows are on; active: which ranks take part, by default all
        -> slots [T, k] int64. Rows take an expert's replicas by turns, and each rank and turn begins with another one:
        those on `rank` if there are any, else all; or, if the layer has shares, each as often as its share says. Raises
        NoWorkers if no active rank holds an expert that is asked for."""
        everyone = (True,) * self.ranks
        choice = self._choice(rank, layer, everyone if active is None else active, experts.device)
        counts = choice.counts[experts]
        if choice.missing and not counts.all():
            expert = int(experts[counts == 0][0])
            raise NoWorkers(f"no active rank holds expert {expert} of layer {layer}; place it anew")
        turns = torch.arange(len(experts), device=experts.device).unsqueeze(1) + rank + turn
        return choice.slots[experts, turns % counts]

    def _choice(self, rank: int, layer: int, active: tuple[bool, ...], device: torch.device) -> _Choice:
        key = (rank, layer, active, device)
        if key not in self._choices:
            self._choices[key] = self._choose_from(rank, layer, active, device)
        return self._choices[key]

    def _choose_from(self, rank: int, layer: int, active: tuple[bool, ...], device: torch.device) -> _Choice:
        if len(active) != self.ranks or not 0 <= rank < self.ranks:
            raise InternalError(f"rank {rank} with {len(active)} flags of activity; there are {self.ranks} ranks")
        row = self._row(layer)
        usable = torch.tensor(active).repeat_interleave(self.slots_per_rank)
        shares = self.shares.get(layer)
        if shares is None:
            here = usable & (torch.arange(len(row)) // self.slots_per_rank == rank)
            is_here = torch.zeros(self.experts, dtype=torch.bool)
            is_here[row[here]] = True
            slots = _slots_of(row, usable & (here | ~is_here[row]), self.experts)
        else:
            slots = _turns_of(row, shares[rank * len(shares) // self.ranks], usable, self.experts)
        counts = (slots != NO_SLOT).sum(1)
        return _Choice(slots.to(device), counts.to(device), missing=not bool(counts.all()))

    def _row(self, layer: int) -> Tensor:
        """phy2log [P] of one layer."""
        if layer < 0 or 1 < len(self.phy2log) <= layer:
            raise InternalError(f"layer {layer} has no placement; there are {len(self.phy2log)}")
        return self.phy2log[layer if len(self.phy2log) > 1 else 0]


def _slots_of(row: Tensor, usable: Tensor, experts: int) -> Tensor:
    """row [P] int64, usable [P] bool -> [n, most usable replicas, at least 1] int64, ascending, padded with NO_SLOT."""
    slots = usable.nonzero()[:, 0]
    chosen = functional.one_hot(row[slots], experts)  # [usable slots, n]
    place = (chosen.cumsum(0) * chosen).sum(1) - 1  # which replica of its expert each slot is
    width = max(1, int(chosen.sum(0).max())) if len(slots) else 1
    table = torch.full((experts, width), NO_SLOT, dtype=torch.int64)
    table[row[slots], place] = slots
    return table


def _turns_of(row: Tensor, share: Tensor, usable: Tensor, experts: int) -> Tensor:
    """row [P] int64, share [P] int64, usable [P] bool -> [n, turns] int64, padded with NO_SLOT: each usable slot as
    often as its share says, evenly among the others of its expert. Where no usable slot has a share, all take turns."""
    given = torch.where(usable, share, 0)
    total = torch.zeros(experts, dtype=torch.int64).index_add_(0, row, given)
    times = torch.where(total[row] > 0, given, usable.long())
    slots = torch.arange(len(row)).repeat_interleave(times)
    nth = torch.arange(len(slots)) - (times.cumsum(0) - times).repeat_interleave(times)
    when = (nth + 0.5) / times[slots]
    slots = slots[when.argsort(stable=True)]
    slots = slots[row[slots].argsort(stable=True)]
    turns = torch.bincount(row[slots], minlength=experts)
    place = torch.arange(len(slots)) - (turns.cumsum(0) - turns)[row[slots]]
    table = torch.full((experts, max(1, int(turns.max()))), NO_SLOT, dtype=torch.int64)
    table[row[slots], place] = slots
    return table


def default_map(experts: int, redundancy: int, ranks: int) -> ExpertMap:
    """Experts in their order over the ranks, then one replica more of as many of them as there are slots left, each on
    a rank that has none of it where there is one. The same for all layers. Raises ClusterError if the slots do not
    divide."""
    total = experts + redundancy
    if total % ranks:
        raise ClusterError(f"{experts} experts and {redundancy} replicas are no multiple of {ranks} ranks")
    held = [[*range(rank * experts // ranks, (rank + 1) * experts // ranks)] for rank in range(ranks)]
    copies = [1] * experts
    for rank, here in enumerate(held):
        after = (rank + 1) * experts // ranks  # so that what a rank holds is replicated by the one before it
        while len(here) < total // ranks:
            turn = [(after + step) % experts for step in range(experts)]
            chosen = min(turn, key=lambda expert: (expert in here, copies[expert]))
            here.append(chosen)
            copies[chosen] += 1
    return ExpertMap(torch.tensor([[expert for here in held for expert in here]]), experts, total // ranks)
