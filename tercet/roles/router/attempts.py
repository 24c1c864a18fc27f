"""What is told of each attempt at a request: a span, if it is traced, and a line of the log if it did not succeed.

A worker that is killed sends no spans; what is known of it is here: who had the request, how long, and how it ended.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from tercet import logs, tracing
from tercet.core import Leg
from tercet.errors import Cancelled, TercetError
from tercet.roles.router.effects import Begun, Ended, Ongoing
from tercet.roles.router.policy import Plan

log = logging.getLogger(__name__)


class Attempts:
    """Event loop only."""

    def __init__(self, spans: tracing.Tracing) -> None:
        self._spans = spans
        self._running: dict[str, Span] = {}  # unique name of a traced request -> the span of its attempt

    def take(self, effect: Begun | Ended) -> None:
        match effect:
            case Begun(ongoing, plan):
                self._begin(ongoing, plan)
            case Ended(ongoing, error):
                self._end(ongoing, error)

    def _begin(self, ongoing: Ongoing, plan: Plan) -> None:
        if ongoing.request.trace is None:
            return
        number = ongoing.attempts - 1
        told: dict[str, AttributeValue] = {"tercet.request_id": ongoing.request.request_id, "tercet.attempt": number}
        for info in (view.info for view in plan.workers):
            told[f"tercet.worker.{info.role}"] = info.worker_id
            told[f"tercet.worker.{info.role}.epoch"] = info.epoch
        if plan.encode:
            told["tercet.worker.encode"] = sorted(view.info.worker_id for view in plan.encode)
        self._running[ongoing.name] = self._spans.below(ongoing.request.trace, f"attempt {number}", told)

    def traced(self, leg: Leg) -> Leg:
        """With what its worker makes spans below."""
        span = self._running.get(leg.ticket.request_id)
        return leg if span is None else replace(leg, trace=tracing.context_of(span))

    def _end(self, ongoing: Ongoing, error: TercetError | None) -> None:
        span = self._running.pop(ongoing.name, None)
        if error is not None and not isinstance(error, Cancelled):
            told = logs.about(ongoing.request.request_id, span, attempt=ongoing.attempts - 1)
            log.info("an attempt has ended: %s", logs.reason(error), extra=told)
        if span is not None:
            tracing.end(span, error, {"tercet.tokens_told": len(ongoing.told.tokens)})
