"""Admit requests, receive their KV, and decode them.

begin ─reserve, admit─> reserved ──Noted──> first token out ─Complete─> joined ─Sampled*─> finished
                           │                                                │
                           └──── Failed ──> quarantine ─Quiesced─> free     └── abort ──> free
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from tercet import tracing
from tercet.core import Done, Load, Progress, StageTimes, Ticket, TokenEvent
from tercet.engine.report import Faulted, Sampled, Scored, StepItem, StepReport
from tercet.errors import EngineFault, InvalidRequest, Overloaded, ProtocolViolation, TercetError
from tercet.roles.first_token import FirstToken
from tercet.roles.joint import Receiver
from tercet.roles.legs import ActiveLeg, Handler, Legs
from tercet.transfer.protocol.facts import Complete, Noted, Quiesced, ReceiveEvent, ReceiveFailed


@dataclass(eq=False)
class _Incoming:
    active: ActiveLeg
    note: FirstToken | None = None
    error: TercetError | None = None  # why the handover failed
    first: Sampled | None = None  # the noted token
    times: StageTimes = field(default_factory=StageTimes)
    joined_at: float | None = None
    decoded: bool = False  # a token that was sampled here is out


class Decode(Handler):
    receiver: Receiver

    def __init__(self, legs: Legs) -> None:
        super().__init__(legs)
        self._incoming: dict[Ticket, _Incoming] = {}  # until the sequence is over and its blocks are settled

    def begin(self, active: ActiveLeg) -> None:
        try:
            hits, leased = self.engine.reserve(active.sequence)
        except Overloaded as error:
            self.receiver.refuse(active.ticket, str(error))
            raise
        self._incoming[active.ticket] = _Incoming(active)
        self.receiver.admit(active.ticket, hits, leased)
        active.stream.admitted(active.leg)

    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        incoming = self._incoming.get(active.ticket)
        if incoming is not None and incoming.joined_at is not None:
            del self._incoming[active.ticket]
            self._end_span(incoming, error)
            self.engine.abort(active.sequence)
        else:
            self.receiver.cancel(active.ticket, error)

    def settling(self, ticket: Ticket) -> bool:
        return ticket in self._incoming

    def counted(self, load: Load) -> Load:
        receiver = self.receiver
        return replace(
            load,
            transfer_dropped=load.transfer_dropped + receiver.dropped().total(),
            transfer_refused=load.transfer_refused + receiver.refused().total(),
            transfer_corrupt=load.transfer_corrupt + receiver.corrupt(),
        )

    async def close(self) -> None:
        await self.legs.loop.run_in_executor(None, self.receiver.stop)

    # ---- events of the mover

    def on_event(self, event: ReceiveEvent) -> None:
        """Called on a mover thread."""
        self.legs.loop.call_soon_threadsafe(self._on_event, event)

    def _on_event(self, event: ReceiveEvent) -> None:
        incoming = self._incoming[event.ticket]
        active = incoming.active
        match event:
            case Noted(_, note):
                self._first_token(incoming, note)
            case Complete():
                self._join(incoming, event)
            case ReceiveFailed(_, error):
                incoming.error = error
                self.engine.quarantine(active.sequence)
                self.legs.fail(active, error)
            case Quiesced(_, verified):
                del self._incoming[event.ticket]
                # KV from a worker whose step failed is intact as sent, but may have been computed wrongly.
                trusted = not isinstance(incoming.error, EngineFault)
                self.engine.release(active.sequence, verified if trusted else 0)

    def _first_token(self, incoming: _Incoming, note: bytes) -> None:
        active = incoming.active
        try:
            first = FirstToken.decode(note)
            self.engine.check_ids(first.token_ids)
        except (InvalidRequest, ProtocolViolation) as error:
            incoming.error = ProtocolViolation(f"the first token of {active.ticket}: {error}")
            self.receiver.cancel(active.ticket, incoming.error)
            return
        incoming.note = first
        active.span.add_event("first_token")
        over = self.engine.finish_after(active.sequence, first.token_id)
        finish, stop_token_id = over or (None, None)
        token = TokenEvent(first.token_id, first.logprob, first.top_logprobs, finish)
        incoming.first = Sampled(active.sequence, token, stop_token_id)
        if self.legs.of(active.ticket) is not None:
            active.stream.token(active.leg, token)

    def _join(self, incoming: _Incoming, complete: Complete) -> None:
        note, first, active = incoming.note, incoming.first, incoming.active
        if note is None or first is None:
            self._drop(incoming)
            return
        incoming.times = StageTimes(
            (*note.stages, ("transfer", complete.transfer_s)),
            kv_bytes=complete.num_bytes,
            transport=note.transport if complete.num_bytes else "",
        )
        incoming.joined_at = time.monotonic()
        active.span.add_event("kv_landed", {"tercet.kv.bytes": complete.num_bytes})
        self.engine.join(active.sequence, note.token_id)
        if first.token.finish is not None:
            self._finish(incoming, first)
        elif self.legs.of(active.ticket) is None:  # given up while the last bytes landed
            self.give_up(active, TercetError("given up"))

    def _drop(self, incoming: _Incoming) -> None:
        """The KV is complete, but there is no valid first token to go on from; it was too late to cancel."""
        active = incoming.active
        del self._incoming[active.ticket]
        self.engine.release(active.sequence)
        self.legs.fail(active, incoming.error or ProtocolViolation(f"{active.ticket} came without a first token"))

    # ---- the engine

    def on_step(self, report: StepReport) -> None:
        self.legs.take_each(report, self._take)

    def _take(self, item: StepItem, now: float) -> None:
        incoming = self._incoming.get(item.sequence.ticket)
        if incoming is None or incoming.joined_at is None:
            return
        active = incoming.active
        assert not isinstance(item, Scored), "prompts are not computed here"
        if isinstance(item, Faulted):
            del self._incoming[active.ticket]
            self._end_span(incoming, item.error)
            self.legs.fail(active, item.error)
            return
        if not incoming.decoded:
            incoming.times = incoming.times.with_stage("first_decode", now - incoming.joined_at)
            incoming.decoded = True
            assert incoming.note is not None
            active.stream.progress(active.leg, Progress(incoming.note.cached_tokens, incoming.times))
        active.stream.token(active.leg, item.token)
        if item.token.finish is not None:
            self._finish(incoming, item)

    def _finish(self, incoming: _Incoming, last: Sampled) -> None:
        active, note = incoming.active, incoming.note
        self._end_span(incoming)
        if self.legs.of(active.ticket) is active:
            assert note is not None
            assert last.token.finish is not None
            done = Done(last.token.finish, last.stop_token_id, note.cached_tokens, incoming.times)
            active.stream.finished(active.leg, done)
            self.legs.forget(active)
        del self._incoming[active.ticket]

    def _end_span(self, incoming: _Incoming, error: TercetError | None = None) -> None:
        """Of the decoding itself; its leg also has the wait for the prompt's KV."""
        decoded = self.legs.spans.child(incoming.active.span, "decode.generate", began=incoming.joined_at)
        tracing.end(decoded, error, {"gen_ai.usage.output_tokens": incoming.active.sequence.num_output})
