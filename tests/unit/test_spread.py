"""Experts spread over ranks that are threads of this process: what each rank gets back is what one process computes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tercet.distributed.exchange import Received, Sent
from tercet.distributed.expert_map import ExpertMap, default_map
from tercet.distributed.place import Place
from tercet.distributed.spread import Spread
from tercet.kernels.moe import ELSEWHERE, TorchExperts

EXPERTS, K, WIDTH, INNER, LAYER = 8, 2, 16, 8, 3


class Desk:
    """Where the ranks' fake exchanges lay what they send."""

    def __init__(self, ranks: int) -> None:
        self.sent: list = [None] * ranks
        self.made: list = [None] * ranks
        self.barrier = threading.Barrier(ranks)


class FakeExchange:
    """Every rank gets the rows of all, with ELSEWHERE in place of slots that it does not have."""

    def __init__(self, desk: Desk, rank: int, slots_per_rank: int) -> None:
        self._desk, self._rank, self._slots_per_rank = desk, rank, slots_per_rank
        self.layers: list[int] = []
        self.sent = Sent()

    @property
    def active(self):
        return (True,) * len(self._desk.sent)

    def dispatch(self, x, slots, weights, layer=0):
        self.layers.append(layer)
        self._desk.sent[self._rank] = x, slots, weights
        self._desk.barrier.wait(20)
        xs, every, shares = (torch.cat(parts) for parts in zip(*self._desk.sent, strict=True))
        here = every // self._slots_per_rank == self._rank
        return Received(xs, torch.where(here, every % self._slots_per_rank, ELSEWHERE), shares), None

    def combine(self, y, handle):
        self._desk.made[self._rank] = y
        self._desk.barrier.wait(20)
        first = sum(len(x) for x, *_ in self._desk.sent[: self._rank])
        own = sum(self._desk.made)[first : first + len(self._desk.sent[self._rank][0])]
        self._desk.barrier.wait(20)  # all have read it
        return own


def weights_of(experts: list[int]) -> TorchExperts:
    draw = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(EXPERTS, *shape, generator=draw) for shape in ((2 * INNER, WIDTH), (WIDTH, INNER)))
    return TorchExperts(gate_up[experts], down[experts])


def batch_of(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weights, experts = torch.rand(rows, EXPERTS, generator=draw).topk(K, -1)
    return torch.randn(rows, WIDTH, generator=draw), experts, weights


@pytest.mark.parametrize("redundancy", [0, EXPERTS])
@pytest.mark.parametrize("rows", [(5, 3), (0, 7), (1, 0), (0, 0), (40, 1)])
@pytest.mark.parametrize("tensor", [1, 2])
def test_rows_come_back_as_one_process_computes_them(tensor, rows, redundancy):
    """tensor 2: both ranks of a replica have the same rows, and their results sum up."""
    ranks = tensor * len(rows)
    experts = default_map(EXPERTS, redundancy, ranks)
    desk, batches = Desk(ranks), [batch_of(seed, count) for seed, count in enumerate(rows)]
    places = [Place(rank, tensor=tensor, data=len(rows), expert=ranks) for rank in range(ranks)]
    exchanges = [FakeExchange(desk, rank, experts.slots_per_rank) for rank in range(ranks)]
    spreads = [Spread(place, experts, exchange) for place, exchange in zip(places, exchanges, strict=True)]

    def forward(rank: int) -> torch.Tensor:
        here = weights_of(experts.experts_on(rank))
        return spreads[rank].forward(here, LAYER, *batches[places[rank].data_rank])

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(forward, range(ranks)))
    for replica, batch in enumerate(batches):
        out = sum(found[rank] for rank in range(ranks) if places[rank].data_rank == replica)
        torch.testing.assert_close(out, weights_of([*range(EXPERTS)]).forward(*batch))
    assert all(exchange.layers == [LAYER] for exchange in exchanges)
    check_counts(spreads, batches)


def check_counts(spreads: list[Spread], batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Every assignment was computed once, in a slot of its expert."""
    wanted = torch.cat([experts.flatten() for _, experts, _ in batches]).bincount(minlength=EXPERTS)
    found = torch.zeros(EXPERTS, dtype=torch.int64)
    for spread in spreads:
        found += spread.computed([LAYER])[0]
    assert found.equal(wanted)


def test_a_rank_of_a_later_stage_has_its_number_within_the_stage():
    experts = default_map(EXPERTS, 0, 2)
    spread = Spread(Place(3, pipeline=2, data=2, expert=2), experts, FakeExchange(Desk(2), 1, experts.slots_per_rank))
    assert spread.rank == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("tensor", [2, 3, 4])
def test_tensor_ranks_have_as_many_rows_of_small_batches(tensor, rows):
    """Over several batches; of one, some have a row more."""
    experts, desk, batches = default_map(EXPERTS, -EXPERTS % tensor, tensor), Desk(tensor), 2 * tensor
    exchanges = [FakeExchange(desk, rank, experts.slots_per_rank) for rank in range(tensor)]
    places = [Place(rank, tensor=tensor, expert=tensor) for rank in range(tensor)]
    spreads = [Spread(place, experts, exchange) for place, exchange in zip(places, exchanges, strict=True)]
    batch = batch_of(0, rows)

    def forward(rank: int) -> list[int]:
        sent = []
        for _ in range(batches):
            spreads[rank].forward(weights_of(experts.experts_on(rank)), LAYER, *batch)
            sent.append(len(desk.sent[rank][0]))
        return sent

    with ThreadPoolExecutor(tensor) as pool:
        sent = [*pool.map(forward, range(tensor))]
    assert [sum(its) for its in sent] == [rows * batches // tensor] * tensor
    assert [sum(its) for its in zip(*sent, strict=True)] == [rows] * batches


def test_replicas_elsewhere_take_the_rows_of_small_batches_by_turns():
    """A rank that has no replica of the expert asks now this one, now that one."""
    experts = ExpertMap(torch.tensor([[0, 1, 2, 2]]), 3, 1)
    asked = []

    class Noted(FakeExchange):
        active = (True,) * 4

        def dispatch(self, x, slots, weights, layer=0):
            asked.extend(slots.flatten().tolist())
            return super().dispatch(x, slots, weights, layer)

    desk = Desk(1)
    spread = Spread(Place(0, data=4, expert=4), experts, Noted(desk, 0, 1))
    one = torch.randn(1, WIDTH), torch.tensor([[2]]), torch.ones(1, 1)
    for _ in range(6):
        spread.forward(weights_of([0]), LAYER, *one)
    assert sorted(asked) == [2, 2, 2, 3, 3, 3]
