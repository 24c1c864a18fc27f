"""One try at a request, on the workers of one plan: its legs, and what their reports mean for it. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from tercet.errors import Cancelled, Overloaded, PeerUnreachable, ProtocolViolation, TercetError
from tercet.roles.router.directory import Incarnation, WorkerView
from tercet.roles.router.encoders import Holders
from tercet.roles.router.policy import Plan


def _without_files(images: Iterable[PromptImage]) -> tuple[PromptImage, ...]:
    """For a worker that does not encode them: its KV is told apart by them."""
    return tuple(replaced(image, content=b"") for image in images)


class WorkerBusy(Exception):  # never leaves the router
    """A worker had no room after all."""

    def __init__(self, worker: WorkerView, outcome: Rejection | Overloaded) -> None:
        self.worker = worker
        self.reason = outcome.reason if isinstance(outcome, Rejection) else str(outcome)


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
    def of(
        cls,
        name: tuple[str, int],
        request: GenerateRequest,
        told: Told,
        plan: Plan,
        holders: Holders,
        now: float,
    ) -> Attempt:
        """Tokens emitted by earlier attempts are recomputed as part of the prompt. name: the request's unique name and
        the attempt's number, for the ticket. holders: to which workers' images no files are sent."""
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
            images=_without_files(request.images) if plan.encode else request.images,
        )
        legs = {plan.decode: leg}
        if plan.prefill is not plan.decode:
            legs = {
                plan.decode: replaced(leg, kind=Role.DECODE, images=_without_files(request.images)),
                plan.prefill: replaced(leg, kind=Role.PREFILL, peer=decoder.transfer_endpoint),
            }
        computing = plan.prefill.info
        ticket_there, endpoint = Ticket(*name, computing.epoch), computing.transfer_endpoint
        for worker, images in plan.encode.items():
            shown = tuple(replaced(i, content=b"") if holders.of(i) is worker else i for i in images)
            its = replaced(leg, ticket=ticket_there, kind=Role.ENCODE, token_ids=(), peer=endpoint, images=shown)
            legs[worker] = its
        return cls(ticket, plan, legs, awaits_scores=params.prompt_logprobs is not None)

    @property
    def tickets(self) -> set[Ticket]:
        """Of its legs: that of the encode workers' names the worker that they send to."""
        return {self.ticket, self.ticket._replace(epoch=self.plan.prefill.info.epoch)}

    @property
    def proven(self) -> set[tuple[Incarnation, ...]]:
        """What has been seen to work when it is done: the pair, and encode workers that have done their part."""
        return {self.plan.incarnations, *((view.incarnation,) for view in self.plan.encode if view not in self.legs)}

    def with_files(self, view: WorkerView) -> Sequence[Leg]:
        """The leg of an encode worker once more, with the files that it was not sent; none if it was sent all."""
        if view not in self.legs or all(image.content for image in self.legs[view].images):
            return ()
        self.legs[view] = replaced(self.legs[view], images=self.plan.encode[view])
        return (self.legs[view],)

    def suspects(self, reporter: WorkerView | None, error: TercetError) -> list[WorkerView]:
        """Encode workers that are to blame for what failed between two workers: the one that says so, or those that had
        not done their part yet if it is the one that computes the prompt, unless that could not reach the next."""
        if reporter is not None and reporter in self.plan.encode:
            return [reporter]
        if reporter is not self.plan.prefill or isinstance(error, PeerUnreachable):
            return []
        return [view for view in self.plan.encode if view in self.legs]

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
        if view in self.plan.encode:
            self._encode_ended(view, outcome)
        else:
            self._prefill_ended(view, outcome)
        return None

    def _decode_ended(self, view: WorkerView | None, outcome: Outcome) -> Done:
        if isinstance(outcome, Done):
            return outcome
        if isinstance(outcome, Rejection):
            raise WorkerBusy(self.plan.decode, outcome)
        if isinstance(outcome, Overloaded):  # the prefill worker had no room after all
            raise WorkerBusy(self.plan.prefill, outcome)
        assert isinstance(outcome, TercetError)
        raise AttemptFailed(view, outcome)

    def _encode_ended(self, view: WorkerView, outcome: Outcome) -> None:
        """Once the first token is here, the embeddings have done their part. Cancelled: whom they were for wants them
        no longer, and says itself why, if that is a failure."""
        if self.committed or isinstance(outcome, Done | Cancelled):
            return
        if isinstance(outcome, Rejection):
            raise WorkerBusy(view, outcome)
        if isinstance(outcome, Overloaded):  # whom they are for turned the offer down
            raise WorkerBusy(self.plan.prefill, outcome)
        assert isinstance(outcome, TercetError)
        raise AttemptFailed(view, outcome)

    def _prefill_ended(self, view: WorkerView, outcome: Outcome) -> None:
        """Once the first token is here, only the decode worker can say whether the KV has landed."""
        if isinstance(outcome, Done) and self.awaits_scores:
            raise AttemptFailed(view, ProtocolViolation(f"{view.info.worker_id} has not told the prompt's logprobs"))
        if isinstance(outcome, Rejection):
            raise WorkerBusy(self.plan.prefill, outcome)
        if isinstance(outcome, Overloaded):  # the decode worker turned its offer down
            raise WorkerBusy(self.plan.decode, outcome)
        if isinstance(outcome, TercetError) and (self.awaits_scores or not self.committed):
            raise AttemptFailed(view, outcome)
