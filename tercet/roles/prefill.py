"""Compute prompts and push their KV: offer, wait for the grant, compute while pushing, finish with the first token.

begin ─open─> offered ─Granted─> engine ─Sampled─> finish ─Released─> finished
                 │                  │
                 └──── Failed ──────┴──> failed                 OpDone: the source blocks are free
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tercet.core import Done, FinishReason, Load, PairState, Ticket, TokenEvent
from tercet.engine.report import Faulted, Scored, StepReport
from tercet.engine.sequence import Sequence
from tercet.errors import Overloaded, PeerUnreachable, TercetError, TransferError
from tercet.roles.first_token import FirstToken
from tercet.roles.legs import ActiveLeg, Handler, Legs
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import Granted, OpDone, Released, SendEvent, SendFailed
from tercet.transfer.transports.contract import Endpoint

MEET_AGAIN_S = 1.0
DIALERS = 16  # a first contact may block for some seconds


@dataclass(eq=False)
class _Outgoing:
    active: ActiveLeg
    arrived: float
    transport: str = ""
    given_up: TercetError | None = None  # set while the peer was still being dialled


class Prefill(Handler):
    sender: KvSender

    def __init__(self, legs: Legs, max_legs: int) -> None:
        super().__init__(legs)
        self._max_legs = max_legs
        self._outgoing: dict[Ticket, _Outgoing] = {}  # until OpDone
        self._wanted: set[str] = set()  # endpoints of the live decode workers
        self._faults: dict[str, PairState] = {}  # endpoint -> why it is not connected
        self._met: set[str] = set()  # endpoints that `_look_after` keeps connected
        self._dialers = ThreadPoolExecutor(DIALERS, thread_name_prefix="kv-dial")
        self._meeters = ThreadPoolExecutor(DIALERS, thread_name_prefix="kv-meet")  # separate: no request waits for it

    def meet(self, endpoints: Iterable[str]) -> None:
        self._wanted = set(endpoints)
        for endpoint in self._wanted - self._met:
            self._met.add(endpoint)
            self._look_after(endpoint)

    def _look_after(self, endpoint: str) -> None:
        """Keep a wanted worker connected: check every MEET_AGAIN_S, dial if need be."""
        if endpoint not in self._wanted:
            self._met.discard(endpoint)
            self._faults.pop(endpoint, None)
        elif self.sender.connected(endpoint):
            self.legs.loop.call_later(MEET_AGAIN_S, self._look_after, endpoint)
        else:
            self.legs.loop.run_in_executor(self._meeters, self._meet, endpoint)

    def _meet(self, endpoint: str) -> None:
        """On a pool thread."""
        try:
            self.sender.connect(endpoint)
            self._faults.pop(endpoint, None)
        except (TransferError, OSError) as error:
            self._faults[endpoint] = PairState(Endpoint.decode(endpoint).worker_id, fault=str(error))
        self.legs.loop.call_soon_threadsafe(self.legs.loop.call_later, MEET_AGAIN_S, self._look_after, endpoint)

    def counted(self, load: Load) -> Load:
        pairs = (*load.pairs, *self.sender.attested(), *list(self._faults.values()))
        return replace(load, transfer_dropped=load.transfer_dropped + self.sender.dropped().total(), pairs=pairs)

    async def close(self) -> None:
        self.meet(())  # or it would connect again
        await self.legs.loop.run_in_executor(None, self.sender.stop)
        for pool in (self._dialers, self._meeters):
            pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, active: ActiveLeg) -> None:
        if len(self._outgoing) >= self._max_legs:
            raise Overloaded(f"{len(self._outgoing)} prompts are waiting or being computed already")
        outgoing = self._outgoing[active.ticket] = _Outgoing(active, time.monotonic())
        if self.sender.connected(active.leg.peer):
            self._open(outgoing, dial=False)
        else:
            self.legs.loop.run_in_executor(self._dialers, self._open, outgoing, True)

    def _open(self, outgoing: _Outgoing, dial: bool) -> None:
        """On a pool thread if it may dial, which blocks."""
        if outgoing.given_up is not None:
            self.legs.loop.call_soon_threadsafe(self._not_opened, outgoing, outgoing.given_up)
            return
        active, leg = outgoing.active, outgoing.active.leg
        deadline = outgoing.arrived + leg.timeout_s
        try:
            outgoing.transport = self.sender.open(active.ticket, leg.peer, len(leg.token_ids), deadline, dial)
        except (TransferError, OSError) as error:
            self.legs.loop.call_soon_threadsafe(self._not_opened, outgoing, error)
        else:
            self.legs.loop.call_soon_threadsafe(self._opened, outgoing)

    def _opened(self, outgoing: _Outgoing) -> None:
        if outgoing.given_up is not None:
            self.sender.cancel(outgoing.active.ticket, outgoing.given_up)

    def _not_opened(self, outgoing: _Outgoing, error: TercetError | OSError) -> None:
        del self._outgoing[outgoing.active.ticket]
        if isinstance(error, TransferError | OSError):
            error = PeerUnreachable(f"the decode worker was not reached: {error}")
        self.legs.fail(outgoing.active, error)

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
                self.engine.abort(active.sequence)
                self.legs.fail(active, error)
            case Released():
                if self.legs.forget(active):
                    active.stream.finished(active.leg, Done(FinishReason.LENGTH))
            case OpDone():
                del self._outgoing[active.ticket]
                self.engine.op_done(active.sequence)

    def _compute(self, outgoing: _Outgoing, first_block: int) -> None:
        active = outgoing.active
        if active.sequence.over:
            return
        active.sequence.hand_over = True
        active.sequence.pushed_blocks = first_block
        try:
            self.engine.add(active.sequence)
        except Overloaded as error:
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
        scheduled = sequence.first_scheduled or 0.0
        first = FirstToken(
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
            cached_tokens=sequence.cached_tokens,
            stages=(
                ("queue", scheduled - (outgoing.arrived if outgoing else scheduled)),
                ("prefill", time.monotonic() - scheduled),
            ),
            transport=outgoing.transport if outgoing else "",
        )
        return first.encode()
