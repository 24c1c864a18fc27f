"""What the router adds to the times of a request: everything before the attempt that brought its first token."""

from __future__ import annotations

import pytest

from tercet.core import (
    Admitted,
    Done,
    FinishReason,
    GenerateRequest,
    Progress,
    Role,
    SamplingParams,
    StageTimes,
    TokenEvent,
    WorkerInfo,
)
from tercet.errors import WorkerDrained, WorkerLost
from tercet.roles.router.decisions import Decisions
from tercet.roles.router.effects import StartLeg, Tell
from tercet.spec import LimitsSpec

TIMES = StageTimes((("queue", 0.25), ("prefill", 0.5)))


class Clocked:
    def __init__(self):
        self.router = Decisions((Role.AGGREGATED,), {Role.AGGREGATED: 4}, LimitsSpec(retries=3, worker_wait_s=60.0))
        infos = [WorkerInfo(f"worker-{i}", Role.AGGREGATED, 1, "", f"at {i}", "") for i in range(2)]
        self.views, _ = self.router.set_workers(infos)
        request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=9), deadline=1000.0)
        self.ongoing, effects = self.router.submit(request, "r.1", 100.0)
        self.told, self.worker, self.leg = [], None, None
        self.take(effects)

    def take(self, effects):
        for effect in effects:
            if isinstance(effect, StartLeg):
                self.worker, self.leg = effect.worker, effect.leg
            if isinstance(effect, Tell):
                self.told.append(effect.event)

    def up(self, number, now):
        self.take(self.router.on_up(self.views[number], now))

    def say(self, outcome, now):
        self.take(self.router.on_report(self.worker, self.leg.ticket, outcome, now))


@pytest.mark.parametrize("last", [Done(FinishReason.LENGTH, times=TIMES, cached_tokens=2), Progress(2, TIMES)])
def test_waiting_and_failed_tries_are_its_queue(last):
    clocked = Clocked()
    clocked.up(0, 103.5)
    clocked.say(Admitted(), 103.5)
    clocked.say(WorkerLost("killed"), 104.0)
    clocked.up(1, 106.0)
    clocked.say(Admitted(), 106.0)
    clocked.say(WorkerDrained("leaves"), 107.0)  # nobody's fault: it is asked again at once, and still takes legs
    clocked.say(Admitted(), 107.5)
    clocked.say(TokenEvent(7), 108.5)
    clocked.say(last, 109.0)
    told = clocked.told[-1]
    assert type(told) is type(last)
    assert told.times == StageTimes((("queue", 7.25), ("prefill", 0.5)))
    assert (told.workers, told.attempts, told.cached_tokens) == ((("aggregated", "worker-1"),), 3, 2)


def test_a_try_behind_the_first_token_adds_nothing():
    """The client had its first token then."""
    clocked = Clocked()
    clocked.up(0, 101.0)
    clocked.say(Admitted(), 101.0)
    clocked.say(TokenEvent(7), 102.0)
    clocked.say(WorkerLost("killed"), 103.0)
    clocked.up(1, 150.0)
    clocked.say(Admitted(), 150.0)
    clocked.say(Done(FinishReason.LENGTH, times=TIMES), 151.0)
    assert clocked.told[-1].times.of("queue") == 1.25
