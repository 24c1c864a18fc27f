"""One try at a request, on the workers of one plan: its legs, and what their reports mean for it. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced

from tercet.core import (
    Admitted,
    Done,
    FinishReason,
    GenerateRequest,
    Leg,
    Outcome,
    Progress,
    PromptImage,
    PromptLogprobs,
    Rejection,
    Role,
    Ticket,
    TokenEvent,
)
from tercet.errors import Overloaded, ProtocolViolation, TercetError
from tercet.roles.router.directory import WorkerView
from tercet.roles.router.policy import Plan


def _unread(images: tuple[PromptImage, ...]) -> tuple[PromptImage, ...]:
    """For a worker that decodes: its KV is told apart by them."""
    return tuple(replaced(image, content=b"") for image in images)


class WorkerBusy(Exception):  # never leaves the router
    """A worker had no room after all."""

    def __init__(self, worker: WorkerView) -> None:
        self.worker = worker


class AttemptFailed(Exception):  # likewise
    """The attempt is over. reporter: the worker that reported it; None: the deadline has passed."""

    def __init__(self, reporter: WorkerView | None, error: TercetError) -> None:
        self.reporter, self.error = reporter, error


RequestEvent = PromptLogprobs | TokenEvent | Progress | Done


@dataclass
class Told:
    """What the client has been sent so far, over all attempts."""

    tokens: list[TokenEvent] = field(default_factory=list)
    scored: bool = False  # the prompt's logprobs

    @property
    def finish(self) -> FinishReason | None:
        """Set once the last token has been sent."""
        return self.tokens[-1].finish if self.tokens else None

    def add(self, event: PromptLogprobs | TokenEvent) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(event)
        else:
            self.scored = True


@dataclass(eq=False)
class Attempt:
    ticket: Ticket
    plan: Plan
    legs: dict[WorkerView, Leg]  # those that have not ended
    committed: bool = False  # a token came, so the prefill worker has done its part
    awaits_scores: bool = False  # the prompt's logprobs, which come before all tokens, are still to come
    held: list[TokenEvent | Progress | Done] = field(default_factory=list)  # events that came before them

    @classmethod
    def of(cls, name: tuple[str, int], request: GenerateRequest, told: Told, plan: Plan, now: float) -> Attempt:
        """Tokens emitted by earlier attempts are recomputed as part of the prompt. name: the request's unique name and
        the attempt's number, for the ticket."""
        decoder, params = plan.decode.info, request.params
        if told.scored:
            params = replaced(params, prompt_logprobs=None)
        tokens = (*request.token_ids, *(event.token_id for event in told.tokens))
        ticket = Ticket(*name, decoder.epoch)
        leg = Leg(
            ticket,
            Role.AGGREGATED,
            tokens,
            len(request.token_ids),
            params,
            request.deadline - now,
            images=request.images,
        )
        legs = {plan.decode: leg}
        if plan.prefill is not plan.decode:
            legs = {
                plan.decode: replaced(leg, kind=Role.DECODE, images=_unread(request.images)),
                plan.prefill: replaced(leg, kind=Role.PREFILL, peer=decoder.transfer_endpoint),
            }
        return cls(ticket, plan, legs, awaits_scores=params.prompt_logprobs is not None)

    def next(self, view: WorkerView | None, outcome: Outcome) -> Sequence[RequestEvent]:
        """The events that a report brings the request. Raises WorkerBusy or AttemptFailed if it ends the attempt."""
        if isinstance(outcome, PromptLogprobs):
            self.awaits_scores = False
            return [outcome, *self.held]
        event = self._event(view, outcome)
        if event is None:
            return ()
        if self.awaits_scores:
            self.held.append(event)
            return ()
        return (event,)

    def _event(self, view: WorkerView | None, outcome: Outcome) -> TokenEvent | Progress | Done | None:
        if isinstance(outcome, Admitted):
            return None
        if isinstance(outcome, TokenEvent):
            self.committed = True
            return outcome
        if isinstance(outcome, Progress):
            return outcome
        if view is self.plan.decode or view is None:
            return self._decode_ended(view, outcome)
        self._prefill_ended(view, outcome)
        return None

    def _decode_ended(self, view: WorkerView | None, outcome: Outcome) -> Done:
        if isinstance(outcome, Done):
            return outcome
        if isinstance(outcome, Rejection):
            raise WorkerBusy(self.plan.decode)
        if isinstance(outcome, Overloaded):  # the prefill worker had no room after all
            raise WorkerBusy(self.plan.prefill)
        assert isinstance(outcome, TercetError)
        raise AttemptFailed(view, outcome)

    def _prefill_ended(self, view: WorkerView, outcome: Outcome) -> None:
        """Once the first token is here, only the decode worker can say whether the KV has landed."""
        if isinstance(outcome, Done) and self.awaits_scores:
            raise AttemptFailed(view, ProtocolViolation(f"{view.info.worker_id} has not told the prompt's logprobs"))
        if isinstance(outcome, Rejection):
            raise WorkerBusy(self.plan.prefill)
        if isinstance(outcome, Overloaded):  # the decode worker turned its offer down
            raise WorkerBusy(self.plan.decode)
        if isinstance(outcome, TercetError) and (self.awaits_scores or not self.committed):
            raise AttemptFailed(view, outcome)
