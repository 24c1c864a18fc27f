"""Two lines, of requests that encode workers have a part in and of others: neither starves the other."""

from __future__ import annotations

import pytest

from tercet.core import (
    Admitted,
    Done,
    FinishReason,
    GenerateRequest,
    Load,
    PairState,
    PromptImage,
    Rejection,
    Role,
    SamplingParams,
    TokenEvent,
    WorkerInfo,
)
from tercet.roles.router.decisions import Decisions
from tercet.roles.router.effects import StartLeg
from tercet.roles.router.waiting import ROOM_S
from tercet.spec import LimitsSpec

IMAGE = (PromptImage(b"a" * 32, (1, 1, 1), ((0, 1),), b"file"),)
ROLES = (Role.ENCODE, Role.PREFILL, Role.DECODE)


class Cluster:
    """Whose decode worker has so many blocks, and takes a request if it has one for each of its tokens."""

    def __init__(self, blocks=10, capacity=8, counts=(1, 1, 1)):
        self.router, self.now, self.free = Decisions(ROLES, dict.fromkeys(ROLES, capacity), LimitsSpec()), 100.0, blocks
        self.started, self.live = [], []
        infos = [
            WorkerInfo(f"{role}-{n}", role, 1, "", f"at {role}-{n}", "")
            for role, count in zip(ROLES, counts, strict=True)
            for n in range(count)
        ]
        self.views, _ = self.router.set_workers(infos)
        for view in self.views:
            self.router.on_up(view, self.now)

    def view(self, name):
        return next(view for view in self.views if view.info.worker_id == name)

    def ask(self, name, tokens, images=(), timeout_s=1000.0):
        params = SamplingParams(max_tokens=1)
        request = GenerateRequest(name, tuple(range(tokens)), params, self.now + timeout_s, name, images)
        ongoing, effects = self.router.submit(request, name, self.now)
        self.do(effects)
        return ongoing

    def do(self, effects):
        for effect in effects:
            if isinstance(effect, StartLeg):
                self.started.append((effect.leg.ticket.request_id, effect.worker.info.worker_id))
                if effect.leg.kind is Role.DECODE:
                    self.decide(effect.worker, effect.leg)

    def decide(self, worker, leg):
        need = len(leg.token_ids)
        taken = need <= self.free
        if taken:
            self.free -= need
            self.live.append((worker, leg))
        self.do(self.router.on_report(worker, leg.ticket, Admitted() if taken else Rejection("no blocks"), self.now))

    def finish_one(self):
        worker, leg = self.live.pop(0)
        self.free += len(leg.token_ids)
        for word in (TokenEvent(1, finish=FinishReason.LENGTH), Done(FinishReason.LENGTH)):
            self.do(self.router.on_report(worker, leg.ticket, word, self.now))

    def wait(self, seconds):
        self.now += seconds
        due = self.router.wake_at()
        if due is not None and due <= self.now:
            self.do(self.router.tick(self.now))

    def admitted(self, name):
        return any(leg.ticket.request_id == name for _, leg in self.live)


@pytest.mark.parametrize("first", [(), IMAGE], ids=["a text", "an image"])
def test_who_was_turned_away_is_not_overtaken_in_the_other_line(first):
    made, others = Cluster(), IMAGE if first == () else ()
    for n in range(4):
        made.ask(f"early-{n}", 1, others)
    made.ask("large", 10, first)
    for n in range(100):
        made.wait(0.05)
        made.ask(f"late-{n}", 1, others)
        made.finish_one()
        if made.admitted("large"):
            break
    assert n == 3, "once the early ones have ended"


def test_a_text_does_not_wait_behind_who_waits_for_an_encode_worker():
    made = Cluster(capacity=1)
    made.do(made.router.on_load(made.view("encode-0"), Load()) or [])
    made.ask("one", 1, IMAGE)
    made.finish_one()  # its pair is free, its encode worker is not: that one has not said that it is done
    made.view("encode-0").legs = 1
    made.ask("two", 1, IMAGE)
    made.ask("three", 1)
    assert made.admitted("three")
    assert not made.admitted("two")


def test_who_comes_and_goes_in_one_line_delays_no_look_at_the_other():
    made = Cluster(blocks=2)
    made.view("encode-0").legs = 8  # it has no room
    made.ask("first", 2)
    made.ask("text", 1)  # is turned away, and looked at again after a pause
    tried = len(made.started)
    for n in range(20):
        gone = made.ask(f"image-{n}", 1, IMAGE)
        made.wait(ROOM_S / 2)
        made.do(made.router.cancel(gone, made.now))
    assert [name for name, _ in made.started[tried:]].count("text") >= 2 * 5  # two legs each time


def test_an_encode_worker_that_cannot_reach_who_computes_is_asked_last():
    made = Cluster(blocks=100, capacity=100, counts=(2, 1, 1))
    cut_off = Load(pairs=(PairState("prefill-0", fault="no route"),))
    made.router.on_load(made.view("encode-0"), cut_off)
    for n in range(20):
        made.ask(f"r{n}", 1, IMAGE)
    assert {worker for _, worker in made.started if worker.startswith("encode")} == {"encode-1"}
    made.router.on_load(made.view("encode-1"), cut_off)
    made.ask("last", 1, (PromptImage(b"b" * 32, (1, 1, 1), ((0, 1),), b"file"),))
    assert any(name == "last" and worker.startswith("encode") for name, worker in made.started)


def test_who_is_in_line_is_counted():
    made = Cluster(blocks=100, capacity=2)
    asked = [made.ask(f"r{n}", 1) for n in range(5)]
    assert made.router.queued == 3
    made.do(made.router.cancel(asked[4], made.now))
    assert made.router.queued == 2
    made.finish_one()
    assert made.router.queued == 1
