"""The router's decisions as a simulator runs them: under a virtual clock, with modelled workers, at a cluster's size.

Nothing of the router is replaced: what takes time (a prompt, a token) are events in a heap.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable

import pytest

from tercet.core import Admitted, Done, FinishReason, GenerateRequest, Role, SamplingParams, TokenEvent, WorkerInfo
from tercet.roles.router.decisions import Decisions
from tercet.roles.router.directory import WorkerView
from tercet.roles.router.effects import AbortLeg, End, Ongoing, StartLeg, Tell
from tercet.spec import LimitsSpec

PREFILL_S, TOKEN_S = 20e-6, 0.01  # a token of a prompt, a token of an answer
PARAMS = SamplingParams(max_tokens=4)
ROLES = (Role.PREFILL, Role.DECODE)


class Cluster:
    """Workers that compute prompts one after the other, and decode all that they have at once."""

    def __init__(self, workers: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.router = Decisions(ROLES, {Role.PREFILL: 16, Role.DECODE: 32}, LimitsSpec())
        self.now = 0.0
        self.due: list[tuple[float, int, Callable[[], list]]] = []
        self.order = itertools.count()
        self.free_at: dict[WorkerView, float] = {}  # a prefill worker
        self.served: dict[WorkerView, int] = {}
        self.waits: list[float] = []  # from submission to first token
        self.told: dict[Ongoing, int] = {}
        infos = [
            WorkerInfo(f"{role.value}-{n}", role, 1, "", f"{n}", "") for role in ROLES for n in range(workers // 2)
        ]
        new, effects = self.router.set_workers(infos)
        self.do(effects)
        for view in new:
            self.do(self.router.on_up(view, self.now))

    def at(self, seconds: float, action: Callable[[], list]) -> None:
        heapq.heappush(self.due, (seconds, next(self.order), action))

    def do(self, effects: list) -> None:
        for effect in effects:
            match effect:
                case StartLeg(view, leg):
                    self.served[view] = self.served.get(view, 0) + 1
                    (self.prefill if leg.kind == "prefill" else self.decode)(view, leg)
                case Tell(ongoing, TokenEvent()):
                    if self.told.setdefault(ongoing, 0) == 0:
                        self.waits.append(self.now - ongoing.request.deadline + 300)
                    self.told[ongoing] += 1
                case End(ongoing, error):
                    assert error is None, error
                    assert self.told.pop(ongoing) == PARAMS.max_tokens
                case AbortLeg():
                    raise AssertionError("nothing fails here")

    def say(self, view: WorkerView, leg, outcome, at: float) -> None:
        self.at(at, lambda: self.router.on_report(view, leg.ticket, outcome, self.now))

    def prefill(self, view: WorkerView, leg) -> None:
        over = max(self.now, self.free_at.get(view, 0.0)) + PREFILL_S * len(leg.token_ids)
        self.free_at[view] = over
        decode = next(v for v in self.router.directory.views.values() if v.info.transfer_endpoint == leg.peer
                      and v.info.role is Role.DECODE)  # fmt: skip
        for number in range(PARAMS.max_tokens):
            last = number + 1 == PARAMS.max_tokens
            token = TokenEvent(number, finish=FinishReason.LENGTH if last else None, at=0.0)
            self.say(decode, leg, token, over + number * TOKEN_S)
        self.say(view, leg, Done(FinishReason.LENGTH), over)
        self.say(decode, leg, Done(FinishReason.LENGTH), over + number * TOKEN_S)

    def decode(self, view: WorkerView, leg) -> None:
        self.say(view, leg, Admitted(), self.now)

    def run(self, requests: int, every_s: float) -> None:
        ids = {length: tuple(range(length)) for length in (64, 256, 1024)}
        arrival, left = 0.0, requests
        while left or self.due:
            if left and (not self.due or arrival <= self.due[0][0]):
                self.now, left = arrival, left - 1
                request = GenerateRequest(
                    "r", ids[self.rng.choice([64, 256, 1024])], PARAMS, self.now + 300, f"client {left % 50}"
                )
                self.do(self.router.submit(request, f"r{left}", self.now)[1])
                arrival += self.rng.expovariate(1 / every_s)
                continue
            due = self.router.wake_at()
            if due is not None and due < self.due[0][0]:
                self.now = due
                self.do(self.router.tick(self.now))
                continue
            self.now, _, action = heapq.heappop(self.due)
            self.do(action())


@pytest.mark.parametrize(("workers", "requests", "every_s"), [(64, 4_000, 400e-6), (8, 2_000, 4e-3)])
def test_many_requests_over_many_workers(workers, requests, every_s):
    """Every request ends whole; every worker serves; nobody waits long where there is room."""
    cluster = Cluster(workers, 1)
    cluster.run(requests, every_s)
    assert len(cluster.waits) == requests
    assert not cluster.router._places
    assert len(cluster.served) == workers, "some are never asked"
    assert sorted(cluster.waits)[requests // 2] < 0.1


@pytest.mark.slow
def test_a_hundred_thousand_requests_over_64_workers():
    began, cluster = time.process_time(), Cluster(64, 2)
    cluster.run(100_000, 400e-6)
    print(f"{time.process_time() - began:.1f} s of processor, {cluster.now:.0f} s of the cluster's")
    assert len(cluster.waits) == 100_000
