"""Ranks that exchange tokens, each in a process of its own, for the tests and the benchmark of the exchange.

A rank does what it is told over a pipe: a method of `_Child` and its arguments; the answer is what that returns, or the
error that it raises. Everything random is drawn from a `Case` by its seed, in the ranks and in the test alike.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.distributed.collective_exchange import CollectiveExchange
from tercet.distributed.direct_exchange import DirectExchange
from tercet.distributed.exchange import Received, Sent
from tercet.distributed.expert_map import ExpertMap
from tercet.distributed.meeting import Group, Meeting
from tercet.errors import TercetError
from tercet.kernels.moe import ELSEWHERE, TorchExperts

INNER = 8  # I, of each expert


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]  # rows of each rank; as many as there are ranks
    k: int = 2
    experts: int = 8
    width: int = 16  # E
    dtype: torch.dtype = torch.float32
    routing: str = "even"  # or "skewed", or "one": each row has expert 0
    layers: int = 1
    spare: int = 1  # slots of a rank beyond those that hold every expert once: replicas
    scales: bool = False  # in place of experts' MLPs, rows times the sum of their weights
    seed: int = 0

    @property
    def slots_per_rank(self) -> int:
        return -(-self.experts // len(self.tokens)) + self.spare

    def map(self) -> ExpertMap:
        draw, slots = self._draw(0), len(self.tokens) * self.slots_per_rank
        rows = []
        for _ in range(self.layers):
            more = torch.randint(self.experts, (slots - self.experts,), generator=draw)
            rows.append(torch.cat([torch.arange(self.experts), more])[torch.randperm(slots, generator=draw)])
        return ExpertMap(torch.stack(rows), self.experts, self.slots_per_rank)

    def weights(self) -> tuple[Tensor, Tensor]:
        """gate_up [n, 2 I, E] and down [n, E, I], the same for all layers."""
        draw = self._draw(1)
        gate_up = torch.randn(self.experts, 2 * INNER, self.width, generator=draw) / self.width**0.5
        down = torch.randn(self.experts, self.width, INNER, generator=draw) / INNER**0.5
        return gate_up.to(self.dtype), down.to(self.dtype)

    def batch(self, layer: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, E], experts [T, k], weights [T, k]."""
        draw, rows = self._draw(2 + layer, rank), self.tokens[rank]
        x = torch.randn(rows, self.width, generator=draw).to(self.dtype)
        wanted = torch.rand(rows, self.experts, generator=draw)
        if self.routing == "skewed":
            wanted = wanted * torch.arange(self.experts, 0, -1) ** 2
        if self.routing == "one":
            wanted[:, 0] = 2
        weights, experts = wanted.topk(self.k, -1)
        return x, experts, weights / weights.sum(-1, keepdim=True)

    def expected(self, layer: int, rank: int) -> Tensor:
        """[T, E] float32, by one process that has all experts."""
        x, experts, weights = self.batch(layer, rank)
        return self.compute(Received(x, experts, weights), list(range(self.experts))).float()

    def compute(self, received: Received, held: list[int]) -> Tensor:
        """held: the expert in each slot of this rank."""
        if self.scales:
            here = received.weights.where(received.slots != ELSEWHERE, 0).sum(-1, keepdim=True)
            return (received.x.float() * here).to(self.dtype)
        gate_up, down = self.weights()
        return TorchExperts(gate_up[held], down[held]).forward(received.x, received.slots, received.weights)

    def _draw(self, *what: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, *what)) % (1 << 32))


@dataclass(frozen=True)
class Out:
    """What one layer gave at one rank."""

    y: Any  # [T, E] float32, numpy
    received: Any  # x, slots, weights, numpy
    sent: Sent
    sent_to: list[int]


class _Child:
    def __init__(self) -> None:
        self.exchange: Any = None
        self.meeting: Meeting | None = None

    def collective(self, rank: int, size: int, path: str, slots_per_rank: int) -> None:
        self.end()
        dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size)
        self.exchange = CollectiveExchange(dist.group.WORLD, slots_per_rank)

    def listen(self, rank: int, size: int, slots_per_rank: int, timeout_s: float, tcp: bool) -> str:
        self.end()
        self.meeting = Meeting(Group("model", "secret", size, slots_per_rank), rank)
        if tcp:
            self.meeting._host_id = "another"  # than that in its endpoint
        self.exchange = DirectExchange(self.meeting, timeout_s)
        return self.meeting.endpoint

    def end(self) -> None:
        if self.exchange is not None:
            self.exchange.close()
        self.exchange = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def call(self, name: str, *args: Any) -> Any:
        """A method of the exchange."""
        return getattr(self.exchange, name)(*args)

    def look(self, *names: str) -> list[Any]:
        """Attributes of the exchange."""
        return [getattr(self.exchange, name) for name in names]

    def run(self, cases: Sequence[Case]) -> list[list[Out]]:
        return [[self._layer(case, layer) for layer in range(case.layers)] for case in cases]

    def _layer(self, case: Case, layer: int) -> Out:
        before, to_each = self.exchange.sent, [*self.exchange.sent_to]
        received = self.dispatch(case, layer)
        y = self.combine()
        sent_to = [after - before for before, after in zip(to_each, self.exchange.sent_to, strict=True)]
        return Out(y, [part.float().numpy() for part in received], self.exchange.sent - before, sent_to)

    def dispatch(self, case: Case, layer: int = 0) -> list[Tensor]:
        rank, found = self.exchange.rank, case.map()
        x, experts, weights = case.batch(layer, rank)
        slots = found.choose(experts, rank, layer, self.exchange.active)
        received, self.handle = self.exchange.dispatch(x, slots, weights, layer)
        self.y = case.compute(received, found.experts_on(rank, layer))
        return [received.x, received.slots, received.weights]

    def prepare(self, case: Case, layer: int = 0) -> None:
        self.dispatch(case, layer)

    def combine(self) -> Any:
        return self.exchange.combine(self.y, self.handle).float().numpy()

    def timed(self, case: Case, rounds: int) -> list[float]:
        """Seconds of dispatch and combine in each round, without what the experts compute."""
        rank, found = self.exchange.rank, case.map()
        x, experts, weights = case.batch(0, rank)
        slots = found.choose(experts, rank)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            received, handle = self.exchange.dispatch(x, slots, weights)
            self.exchange.combine(received.x, handle)
            seconds.append(time.perf_counter() - began)
        return seconds


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    child = _Child()
    while True:
        try:
            verb, args = pipe.recv()
        except EOFError:
            child.end()
            return
        try:
            answer = getattr(child, verb)(*args)
        except TercetError as error:
            answer = error
        pipe.send((time.monotonic(), answer))


class Rank:
    """A process, as the test sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.answered = 0.0  # time.monotonic() of the last answer

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, verb: str, *args: Any) -> None:
        self._pipe.send((verb, args))

    def answer(self, seconds: float = 60.0) -> Any:
        """An error is returned, too."""
        assert self._pipe.poll(seconds), "the rank does not answer"
        self.answered, found = self._pipe.recv()
        return found

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def ask_all(ranks: Sequence[Rank], verb: str, *args: Any) -> list[Any]:
    for rank in ranks:
        rank.ask(verb, *args)
    answers = [rank.answer() for rank in ranks]
    for answer in answers:
        if isinstance(answer, TercetError):
            raise answer
    return answers


def collective(ranks: Sequence[Rank], path: str, slots_per_rank: int) -> None:
    for number, rank in enumerate(ranks):
        rank.ask("collective", number, len(ranks), path, slots_per_rank)
    assert [rank.answer() for rank in ranks] == [None] * len(ranks)


def direct(ranks: Sequence[Rank], slots_per_rank: int, timeout_s: float = 20.0, tcp: bool = False) -> dict[int, str]:
    """-> the endpoints."""
    for number, rank in enumerate(ranks):
        rank.ask("listen", number, len(ranks), slots_per_rank, timeout_s, tcp)
    endpoints = {number: rank.answer() for number, rank in enumerate(ranks)}
    ask_all(ranks, "call", "connect", endpoints)
    return endpoints
