"""Compute prompts and push their KV: offer, wait for the grant, compute while pushing, finish with the first token.

begin ─open─> offered ─Granted─> engine ─Sampled─> finish ─Released─> finished
                 │                  │
                 └──── Failed ──────┴──> failed                 OpDone: the source blocks are free
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from opentelemetry.trace import Span

from tercet import tracing
from tercet.core import Done, FinishReason, Load, Ticket, TokenEvent
from tercet.engine.report import Faulted, Scored, StepReport
from tercet.engine.sequence import Sequence
from tercet.errors import Overloaded, TercetError, WorkerDrained
from tercet.roles.first_token import FirstToken
from tercet.roles.legs import ActiveLeg, Handler, Legs
from tercet.roles.peers import Peers, Sender
from tercet.roles.stages import until_first_token
from tercet.transfer.protocol.facts import Granted, OpDone, Released, SendEvent, SendFailed


@dataclass(eq=False)
class _Outgoing:
    active: ActiveLeg
    arrived: float
    transport: str = ""
    given_up: TercetError | None = None  # set while the peer was still being dialled
    sampled: float | None = None  # when its first token was, as time.monotonic()
    transfer: Span = tracing.UNTRACED  # from the grant on


class Prefill(Handler):
    sender: Sender
    peers: Peers

    def __init__(self, legs: Legs, max_legs: int) -> None:
        super().__init__(legs)
        self._max_legs = max_legs
        self._outgoing: dict[Ticket, _Outgoing] = {}  # until OpDone

    def send_by(self, sender: Sender) -> None:
        self.sender, self.peers, self.push = sender, Peers(self.legs.loop, sender), sender.push

    def meet(self, endpoints: Iterable[str]) -> None:
        self.peers.meet(endpoints)

    def counted(self, load: Load) -> Load:
        dropped = load.transfer_dropped + self.sender.dropped().total()
        return replace(load, transfer_dropped=dropped, pairs=(*load.pairs, *self.peers.states()))

    async def close(self) -> None:
        await self.peers.close()

    def begin(self, active: ActiveLeg) -> None:
        if len(self._outgoing) >= self._max_legs:
            raise Overloaded(f"{len(self._outgoing)} prompts are waiting or being computed already")
        leg = active.leg
        outgoing = self._outgoing[active.ticket] = _Outgoing(active, time.monotonic())
        self.peers.open(
            active.ticket,
            leg.peer,
            len(leg.token_ids),
            outgoing.arrived + leg.timeout_s,
            lambda: outgoing.given_up is None,
            partial(self._opened, outgoing),
        )

    def _opened(self, outgoing: _Outgoing, told: str | TercetError) -> None:
        if isinstance(told, TercetError):
            del self._outgoing[outgoing.active.ticket]
            self.legs.fail(outgoing.active, told)
            return
        outgoing.transport = told
        if outgoing.given_up is not None:
            self.sender.cancel(outgoing.active.ticket, outgoing.given_up)

    def give_up(self, active: ActiveLeg, error: TercetError) -> None:
        outgoing = self._outgoing.get(active.ticket)
        if outgoing is not None:
            outgoing.given_up = error
            self.sender.cancel(active.ticket, error)

    def settling(self, ticket: Ticket) -> bool:
        return ticket in self._outgoing

    # ---- events of the mover

    def on_event(self, event: SendEvent) -> None:
        """Called on a mover thread."""
        self.legs.loop.call_soon_threadsafe(self._on_event, event)

    def _on_event(self, event: SendEvent) -> None:
        outgoing = self._outgoing.get(event.ticket)
        if outgoing is None:
            return
        active = outgoing.active
        match event:
            case Granted(_, first_block):
                self._compute(outgoing, first_block)
            case SendFailed(_, error):
                self._end_spans(outgoing, error)
                self.engine.abort(active.sequence)
                self.legs.fail(active, error)
            case Released(_, num_bytes):
                self._end_spans(outgoing, num_bytes=num_bytes)
                if self.legs.forget(active):
                    active.stream.finished(active.leg, Done(FinishReason.LENGTH))
            case OpDone():
                del self._outgoing[active.ticket]
                self.engine.op_done(active.sequence)

    def _end_spans(self, outgoing: _Outgoing, error: TercetError | None = None, num_bytes: int = 0) -> None:
        active, sequence = outgoing.active, outgoing.active.sequence
        if outgoing.sampled is not None:
            computed = self.legs.spans.child(active.span, "prefill.compute", began=sequence.first_scheduled)
            told = {"tercet.chunks": sequence.chunks, "tercet.cached_tokens": sequence.cached_tokens}
            tracing.end(computed, None, told, outgoing.sampled)
        tracing.end(outgoing.transfer, error, {"tercet.kv.bytes": num_bytes})

    def _compute(self, outgoing: _Outgoing, first_block: int) -> None:
        active = outgoing.active
        told = {"tercet.kv.transport": outgoing.transport}
        outgoing.transfer = self.legs.spans.child(active.span, "kv.transfer", told)
        if active.sequence.over:
            return
        active.sequence.hand_over = True
        active.sequence.pushed_blocks = first_block
        try:
            self.engine.add(active.sequence)
        except (Overloaded, WorkerDrained) as error:  # the latter: its replica's rank has just been lost
            self.sender.cancel(active.ticket, error)

    # ---- the engine

    def on_step(self, report: StepReport) -> None:
        """On the engine's thread: the first token goes with WRITTEN, after the last layer."""
        for item in report:
            if isinstance(item, Faulted):
                self.sender.cancel(item.sequence.ticket, item.error)
            elif isinstance(item, Scored):
                self.legs.loop.call_soon_threadsafe(self._tell_scores, item)
            else:
                self.sender.finish(item.sequence.ticket, self._note_of(item.sequence, item.token))

    def _tell_scores(self, scored: Scored) -> None:
        active = self.legs.of(scored.sequence.ticket)
        if active is not None:
            active.stream.prompt_logprobs(active.leg, scored.scores)

    def _note_of(self, sequence: Sequence, token: TokenEvent) -> bytes:
        outgoing = self._outgoing.get(sequence.ticket)
        now = time.monotonic()
        if outgoing is not None:
            outgoing.sampled = now
        scheduled = sequence.first_scheduled or now
        first = FirstToken(
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
            cached_tokens=sequence.cached_tokens,
            stages=until_first_token(
                outgoing.arrived if outgoing else scheduled,
                scheduled,
                outgoing.active.last_image if outgoing else None,
                now,
            ),
            transport=outgoing.transport if outgoing else "",
        )
        return first.encode()
