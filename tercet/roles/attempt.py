"""One try at a request, on the workers of one plan: its legs, and what their reports mean for it. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as replaced

from tercet.core import Done, GenerateRequest, TokenEvent
from tercet.errors import Overloaded, TercetError
from tercet.roles.plans import Plan
from tercet.wire.codec import Leg
from tercet.wire.worker_client import Admitted, LegKey, Outcome, Rejection, WorkerLink


class Busy(Exception):  # never leaves the router
    """A worker had no room after all."""

    def __init__(self, link: WorkerLink) -> None:
        self.link = link


class Failed(Exception):  # likewise
    """The attempt is over. reporter: whose word that is; None: the deadline's."""

    def __init__(self, reporter: WorkerLink | None, error: TercetError) -> None:
        self.reporter, self.error = reporter, error


@dataclass(eq=False)
class Attempt:
    key: LegKey
    plan: Plan
    legs: dict[WorkerLink, Leg]  # those that have not ended
    committed: bool = False  # a token came, so the prefill worker has done its part

    @classmethod
    def of(cls, key: LegKey, request: GenerateRequest, emitted: list[TokenEvent], plan: Plan, now: float) -> Attempt:
        """What was emitted is computed again as a part of the prompt."""
        decoder = plan.decode.info
        tokens = (*request.token_ids, *(event.token_id for event in emitted))
        base = Leg(*key, decoder.epoch, "", tokens, len(request.token_ids), request.params, request.deadline - now)
        legs = {link: replaced(base, kind=link.info.role.value) for link in plan.links}
        if plan.prefill is not plan.decode:
            legs[plan.prefill] = replaced(legs[plan.prefill], peer=decoder.transfer_endpoint)
        return cls(key, plan, legs)

    def next(self, link: WorkerLink | None, outcome: Outcome) -> TokenEvent | Done | None:
        """What a report is to the request; None: nothing. Raises Busy or Failed if it ends the attempt."""
        if isinstance(outcome, Admitted):
            return None
        if isinstance(outcome, TokenEvent):
            self.committed = True
            return outcome
        if link is self.plan.decode or link is None:
            return self._decode_ended(link, outcome)
        self._prefill_ended(link, outcome)
        return None

    def _decode_ended(self, link: WorkerLink | None, outcome: Outcome) -> Done:
        if isinstance(outcome, Done):
            return outcome
        if isinstance(outcome, Rejection):
            raise Busy(self.plan.decode)
        if isinstance(outcome, Overloaded):  # the prefill worker had no room after all
            raise Busy(self.plan.prefill)
        assert isinstance(outcome, TercetError)
        raise Failed(link, outcome)

    def _prefill_ended(self, link: WorkerLink, outcome: Outcome) -> None:
        """Once the first token is here, only the decode worker can say whether the KV has landed."""
        if isinstance(outcome, Rejection):
            raise Busy(self.plan.prefill)
        if isinstance(outcome, Overloaded):  # the decode worker turned its offer down
            raise Busy(self.plan.decode)
        if isinstance(outcome, TercetError) and not self.committed:
            raise Failed(link, outcome)
