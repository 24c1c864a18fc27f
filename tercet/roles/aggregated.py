"""Compute prompts and decode them in one engine: for small deployments, and as a baseline to compare with."""

from __future__ import annotations

from tercet import tracing
from tercet.core import Done, Progress, StageTimes
from tercet.engine.report import Faulted, Scored, StepItem, StepReport
from tercet.errors import TercetError
from tercet.roles.legs import ActiveLeg, Handler, Legs
from tercet.roles.stages import until_first_token


class Aggregated(Handler):
    def __init__(self, legs: Legs) -> None:
        super().__init__(legs)
        self._first_token_at: dict[ActiveLeg, float] = {}
        self._times: dict[ActiveLeg, StageTimes] = {}  # of those that decode

    def begin(self, active: ActiveLeg) -> None:
        self.engine.add(active.sequence)
        active.stream.admitted(active.leg)

    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        self._forget(active, error)
        self.engine.abort(active.sequence)

    def on_step(self, report: StepReport) -> None:
        self.legs.take_each(report, self._take)

    def _take(self, item: StepItem, now: float) -> None:
        active = self.legs.of(item.sequence.ticket)
        if active is None:
            return
        if isinstance(item, Faulted):
            self._forget(active, item.error)
            self.legs.fail(active, item.error)
            return
        if isinstance(item, Scored):
            active.stream.prompt_logprobs(active.leg, item.scores)
            return
        cached = item.sequence.cached_tokens
        if active not in self._first_token_at:
            self._first_token_at[active] = now
        elif active not in self._times:
            self._times[active] = self._times_of(active, now)
            active.stream.progress(active.leg, Progress(cached, self._times[active]))
        active.stream.token(active.leg, item.token)
        if item.token.finish is not None:
            times = self._times.get(active) or self._times_of(active, now)
            active.stream.finished(active.leg, Done(item.token.finish, item.stop_token_id, cached, times))
            self._forget(active)
            self.legs.forget(active)

    def _times_of(self, active: ActiveLeg, now: float) -> StageTimes:
        """now: its second token is there, or its only one."""
        sequence, first = active.sequence, self._first_token_at[active]
        scheduled = sequence.first_scheduled or now
        until = until_first_token(sequence.arrived, scheduled, active.last_image, first)
        return StageTimes((*until, ("first_decode", now - first)))

    def _forget(self, active: ActiveLeg, error: TercetError | None = None) -> None:
        first, sequence, spans = self._first_token_at.pop(active, None), active.sequence, self.legs.spans
        if first is not None:
            computed = spans.child(active.span, "prefill.compute", began=sequence.first_scheduled)
            told = {"tercet.chunks": sequence.chunks, "tercet.cached_tokens": sequence.cached_tokens}
            tracing.end(computed, None, told, first)
            decoded = spans.child(active.span, "decode.generate", began=first)
            tracing.end(decoded, error, {"gen_ai.usage.output_tokens": sequence.num_output})
        self._times.pop(active, None)
