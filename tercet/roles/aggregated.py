"""Compute prompts and decode them in one engine: for small deployments, and as a baseline to compare with."""

from __future__ import annotations

import time

from tercet.core import Done, StageTimes
from tercet.engine.report import Faulted, Scored, StepItem, StepReport
from tercet.errors import TercetError
from tercet.roles.legs import ActiveLeg, Handler, Legs


class Aggregated(Handler):
    def __init__(self, legs: Legs) -> None:
        super().__init__(legs)
        self._first_token_at: dict[ActiveLeg, float] = {}
        self._first_decode_s: dict[ActiveLeg, float] = {}

    def begin(self, active: ActiveLeg) -> None:
        self.engine.add(active.sequence)
        active.stream.admitted(active.leg)

    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        self._times_of(active, time.monotonic())
        self.engine.abort(active.sequence)

    def on_step(self, report: StepReport) -> None:
        self.legs.take_each(report, self._take)

    def _take(self, item: StepItem, now: float) -> None:
        active = self.legs.of(item.sequence.ticket)
        if active is None:
            return
        if isinstance(item, Faulted):
            self._times_of(active, now)
            self.legs.fail(active, item.error)
            return
        if isinstance(item, Scored):
            active.stream.prompt_logprobs(active.leg, item.scores)
            return
        active.stream.token(active.leg, item.token)
        if active not in self._first_token_at:
            self._first_token_at[active] = now
        elif active not in self._first_decode_s:
            self._first_decode_s[active] = now - self._first_token_at[active]
        if item.token.finish is not None:
            times = self._times_of(active, now)
            done = Done(item.token.finish, item.stop_token_id, item.sequence.cached_tokens, times)
            active.stream.finished(active.leg, done)
            self.legs.forget(active)

    def _times_of(self, active: ActiveLeg, now: float) -> StageTimes:
        sequence = active.sequence
        scheduled = sequence.first_scheduled or now
        first = self._first_token_at.pop(active, now)
        return StageTimes(
            (
                ("queue", scheduled - sequence.arrived),
                ("prefill", first - scheduled),
                ("first_decode", self._first_decode_s.pop(active, 0.0)),
            )
        )
