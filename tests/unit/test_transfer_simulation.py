"""The real protocol code under a seeded scheduler and a virtual clock: thousands of interleavings and faults.

A failing seed is in the assertion's message and replays exactly. The mutants at the end put back bugs that other
systems have had; the simulation must catch each of them.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from tercet.core import Ticket
from tercet.transfer.protocol import facts, incoming
from tercet.transfer.protocol.arrivals import Arrivals
from tercet.transfer.protocol.effects import Send
from tercet.transfer.protocol.fake import LAYERS, FakeLink, Move
from tercet.transfer.protocol.inbound import Inbound
from tercet.transfer.protocol.incoming import Incoming
from tercet.transfer.protocol.messages import AbortAck, Written
from tercet.transfer.protocol.outbound import Outbound
from tercet.transfer.protocol.outgoing import Outgoing
from tercet.transfer.protocol.shards import Cancel, ReceiveJoint, SendJoint

SEEDS = 2000
SHAPES = {(1, 1): SEEDS, (2, 1): 1000, (1, 2): 700, (2, 2): 700}  # (sources, destinations) -> seeds
FEW = 300  # of them in the default run
STEPS = 120
BLOCKS = 3  # of a prompt
KINDS = [(False, True), (True, False), (True, True)]  # one_sided, fenceable: tcp, shm, nixl
FAULTS = (
    *("cancel_inbound", "cancel_outbound", "drop", "duplicate", "flip", "pass_time", "break", "stop"),
    *("prefill_death", "decode_death", "lose_push", "stall"),
)


class Simulation:
    """Requests come, are pushed and finished as prefill workers would, over blocks that are scarce on both sides: a
    block that is freed too early is soon somebody else's."""

    def __init__(self, seed: int, shape: tuple[int, int] = (1, 1), overlap: bool = False) -> None:
        """shape: how many sources a ticket has, and how many destinations. overlap: the sources hold the same head, and
        nobody the others."""
        self.rng = random.Random(seed)
        one_sided, fenceable = self.rng.choice(KINDS)
        self.link = FakeLink(one_sided=one_sided, fenceable=fenceable, sources=shape[0], destinations=shape[1])
        self.overlap = overlap
        if overlap:
            self.link.terms = {(s, d): self.link.terms[0, d] for s, d in self.link.pairs}
        # Two faults that meet now and then show more than many that end everything soon.
        rare_pair = ["flip", "duplicate"]
        self.faults = rare_pair if seed % 4 == 0 else self.rng.sample(FAULTS, self.rng.randint(0, 4))
        self.strike_share = self.rng.choice([0.08, 0.15] if self.faults is rare_pair else [0.02, 0.08, 0.3])
        self.tickets: list[Ticket] = []
        self.to_open: list[tuple[int, Ticket]] = []  # (source, ticket)
        self.pushed: Counter[tuple[int, Ticket]] = Counter()  # layers, of (source, ticket)
        self.stopped: set[int] = set()  # sources that write nothing for now
        self.stalled: set[Ticket] = set()  # their engine has lost them, while everybody lives

    def run(self) -> None:
        for _ in range(STEPS):
            if self.faults and self.rng.random() < self.strike_share:
                self.strike(self.rng.choice(self.faults))
            if moves := self.moves():
                self.rng.choice(moves)()
        self.finish()
        self.check()

    def moves(self) -> list[Move]:
        moves = [m for m in self.link.choices() if self.link.writer_of(m) not in self.stopped]
        for s in self.link.sources:
            granted = {e.ticket for e in self.link.sent[s] if isinstance(e, facts.Granted)} - self.stalled
            computing = [t for t in self.link.reading[s] if t in granted and self.pushed[s, t] <= LAYERS]
            moves += [lambda s=s, t=t: self.advance(s, t) for t in computing]
        moves += [lambda at=at: self.open(*at) for at in self.to_open]
        free = sorted(set(range(2 * BLOCKS)) - set(self.link.leased))
        if len(free) >= BLOCKS and len(self.tickets) < 8:
            moves.append(lambda: self.admit(free))
        return moves

    def admit(self, free: list[int]) -> None:
        ticket = Ticket(f"r{len(self.tickets)}", 0, 1)
        self.tickets.append(ticket)
        hits = self.rng.choice([0, 0, 1, BLOCKS])
        self.to_open += [(s, ticket) for s in self.link.sources]
        self.link.admit(ticket, self.rng.sample(free, BLOCKS - hits), hits)

    def open(self, s: int, ticket: Ticket) -> None:
        self.to_open.remove((s, ticket))
        number = self.tickets.index(ticket)
        self.link.open(ticket, list(range(BLOCKS * number, BLOCKS * (number + 1))), s)

    def advance(self, s: int, ticket: Ticket) -> None:
        layer = self.pushed[s, ticket]
        self.pushed[s, ticket] += 1
        if layer < LAYERS:
            self.link.push(ticket, layer, s)
        else:
            self.link.finish(ticket, s)

    def strike(self, fault: str) -> None:
        s, d = self.rng.choice(self.link.pairs)
        self.strike_anyone(fault, s, d)
        if self.tickets:
            self.strike_a_ticket(fault, self.rng.choice(self.tickets), s)

    def strike_a_ticket(self, fault: str, ticket: Ticket, s: int) -> None:
        match fault:
            case "cancel_inbound":
                self.link.cancel_inbound(ticket)
            case "cancel_outbound":
                self.link.cancel_outbound(ticket, s)
            case "lose_push":
                self.pushed[s, ticket] += 1
            case "stall":
                self.stalled.add(ticket)

    def strike_anyone(self, fault: str, s: int, d: int) -> None:
        link, number = self.link, self.rng.randrange(1000)
        match fault:
            case "drop" | "duplicate":
                getattr(link, fault)(number)
            case "flip":
                link.flips += number % 4
            case "pass_time":
                link.pass_time(number % 12, heartbeats=number % 3 > 0)
            case "stop":
                self.stopped ^= {s}
            case "break":
                link.break_connection(s, d)
            case "prefill_death":
                link.prefill_dies(s)
            case "decode_death":
                link.decode_dies(d)

    def finish(self) -> None:
        """No more faults: everybody lives and says so. Whatever does not advance ends all the same; at last the
        writers' end is proven."""
        self.stopped.clear()
        while not self.faults and (moves := self.moves()):
            moves[0]()
        for _ in range(9 * len(self.link.pairs)):  # the end of each is news to those that wait
            while choices := self.link.choices():
                choices[0]()
            self.link.pass_time(4.0, heartbeats=True)
        while choices := self.link.choices():
            choices[0]()
        ended = {e.ticket for e in self.link.received if isinstance(e, facts.Complete | facts.ReceiveFailed)}
        assert ended == set(self.tickets), "a ticket hangs"
        assert not any(self.link.reading), "leaked source blocks"
        for s in self.link.sources:
            self.link.prefill_dies(s)

    def check(self) -> None:
        """Each ticket ended once on each side; nothing is leased or read any more."""
        link = self.link
        assert link.leased == {}, "leaked blocks"
        assert link.live() == []
        for heard in (link.received, *link.sent):
            counts = Counter((type(e), e.ticket) for e in heard)
            assert all(n == 1 for n in counts.values()), counts
        for ticket in self.tickets:
            ours = {type(e) for e in link.received if e.ticket == ticket}
            complete, failed = {facts.Complete} <= ours, {facts.ReceiveFailed, facts.Quiesced} <= ours
            assert complete != failed, f"{ticket} ended as {ours}"
            assert facts.Noted in ours or not complete, f"{ticket} is complete without its note"
        for sent in link.sent:
            done = {e.ticket for e in sent if isinstance(e, facts.OpDone)}
            assert not done & {e.ticket for e in sent[-1:] if not isinstance(e, facts.OpDone)}, "told after OpDone"
        if not self.faults:
            failed = {e.ticket for e in link.received if isinstance(e, facts.ReceiveFailed)}
            assert failed == set(self.tickets if self.overlap else ())
            assert self.overlap or not any(isinstance(e, facts.SendFailed) for e in link.events)


def failing_seed(seeds: int, shape: tuple[int, int] = (1, 1), overlap: bool = False) -> int | None:
    for seed in range(seeds):
        try:
            Simulation(seed, shape, overlap).run()
        except (AssertionError, KeyError):
            return seed
    return None


@functools.cache
def seen_in(seed: int, shape: tuple[int, int]) -> Counter[str]:
    """Of the protocol as it is: once, for both tests."""
    simulation = Simulation(seed, shape)
    simulation.run()
    seen = Counter(type(e).__name__ for e in simulation.link.events)
    seen["corrupt"] += sum(inbound.corrupt for inbound in simulation.link.inbounds)
    seen["resumable"] += sum(isinstance(e, facts.Quiesced) and e.verified > 0 for e in simulation.link.received)
    return seen


CASES = [(shape, range(FEW)) for shape in SHAPES]
CASES += [pytest.param(shape, range(FEW, seeds), marks=pytest.mark.slow) for shape, seeds in SHAPES.items()]


@pytest.mark.parametrize(("shape", "seeds"), CASES, ids=str)
def test_no_interleaving_breaks_the_protocol(shape, seeds):
    for seed in seeds:
        try:
            seen_in(seed, shape)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_sources_that_overlap_complete_nothing(shape):
    for seed in range(80):
        simulation = Simulation(seed, shape, overlap=True)
        simulation.run()
        assert not any(isinstance(e, facts.Complete) for e in simulation.link.received), seed


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_replays_exactly(shape):
    first, second = Simulation(17, shape), Simulation(17, shape)
    first.run()
    second.run()
    assert list(map(repr, first.link.events)) == list(map(repr, second.link.events))  # errors know no equality
    assert first.link.memory == second.link.memory


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_end_is_reached(shape):
    """The oracle would be worth little if, say, no seed ever fetched a block again."""
    seen: Counter[str] = Counter()
    for seed in range(FEW):
        seen.update(seen_in(seed, shape))
    assert min(seen[k] for k in ("Complete", "Quiesced", "OpDone", "Released", "corrupt", "resumable")) > 20, seen


# ---- mutants: (where, method, what it does wrong)


def frees_on_failure(_: Callable) -> Callable:
    """Blocks are reused while a remote writer may still write (SGLang 24527, 23020; vLLM PR 45357)."""

    def settle(self):
        self.over = True
        return [facts.Quiesced(self.ticket)]

    return settle


def frees_on_timeout(real: Callable) -> Callable:
    """A lease that ran out counts as proof."""

    def tick(self, now):
        for source in self.sources.values():
            source.done = source.done or source.expires < now
        return real(self, now)

    return tick


def asserts_on_late_completion(real: Callable) -> Callable:
    """The engine crashes on a completion of a request that it has forgotten (vLLM 43226)."""

    def on_message(self, peer, message, now):
        assert not hasattr(message, "ticket") or message.ticket in self._joints, "unknown ticket"
        return real(self, peer, message, now)

    return on_message


def forgets_op_done_after_abort(real: Callable) -> Callable:
    """Source blocks leak when the peer aborts (vLLM 46283)."""

    def fail(self, error, farewell):
        effects = real(self, error, farewell)
        return [e for e in effects if not isinstance(e, facts.OpDone)] if isinstance(farewell, AbortAck) else effects

    return fail


def op_done_while_writing(_: Callable) -> Callable:
    """Source blocks are reused while they are still being read."""

    def settle(self):
        self.pending.clear()
        told, self.ended = self.ended, True
        return [] if told else [facts.OpDone(self.ticket)]

    return settle


def keeps_tickets_of_a_dead_peer(_: Callable) -> Callable:
    """A peer's restart leaves its tickets behind (vLLM 49238)."""
    return lambda self, peer: []


def acks_before_the_last_write(real: Callable) -> Callable:
    """ABORT_ACK, the receiver's proof, overtakes a write that is under way."""

    def on_message(self, peer, message, now):
        effects = real(self, peer, message, now)
        if type(message).__name__ == "Abort" and not any(isinstance(e, Send) for e in effects):
            effects.append(Send(peer, AbortAck(message.ticket)))
        return effects

    return on_message


def says_written_before_the_last_write(_: Callable) -> Callable:
    def say(self, now):
        if self.note is None:
            return []
        written, self.note = Written(self.ticket, self.written_bytes, 0.0, self.note), None
        return [Send(self.peer, written)]

    return say


def ignores_digests(real: Callable) -> Callable:
    def end_landing(self, peer, data, good, now):
        return real(self, peer, data, None if good is None else good | True, now)

    return end_landing


def obeys_a_duplicate_resend(real: Callable) -> Callable:
    """The same RESEND twice writes twice, and the second write may come after the blocks are free."""

    def resend(self, asked, now):
        effects = real(self, asked, now)
        self.resent.clear()
        return effects

    return resend


def takes_a_duplicate_of_corrupt_data(real: Callable) -> Callable:
    """A late copy of DATA that was asked for again asks once more, so one write is left over at the end."""

    def begin(self, data):
        self._asked = dict.fromkeys(self._asked, data.resend)
        return real(self, data)

    return begin


def counts_duplicates_as_landed(real: Callable) -> Callable:
    """Completion counts messages instead of bytes that landed."""

    def end(self, data, good):
        real(self, data, good)
        self._landed[:] |= self._landed.sum() + 1 >= self._landed.size

    return end


def takes_life_for_progress(_: Callable) -> Callable:
    """Heartbeats keep a ticket alive that nothing moves any more. Put into both sides, since each rescues the other."""

    def heartbeat(self, mark, now):
        self.expires = self.advanced = now + self.lease_s

    return heartbeat


def takes_life_for_progress_too(_: Callable) -> Callable:
    def heartbeat(self, source, mark, now):
        source.expires = self._advanced = now + self._lease_s

    return heartbeat


MUTANTS = [
    (Incoming, "_settle", frees_on_failure),
    (Incoming, "tick", frees_on_timeout),
    (Outbound, "on_message", asserts_on_late_completion),
    (Outgoing, "fail", forgets_op_done_after_abort),
    (Outgoing, "_settle", op_done_while_writing),
    (Outbound, "peer_down", keeps_tickets_of_a_dead_peer),
    (Inbound, "peer_dead", keeps_tickets_of_a_dead_peer),
    (Outbound, "on_message", acks_before_the_last_write),
    (Outgoing, "_say_if_written", says_written_before_the_last_write),
    (Inbound, "end_landing", ignores_digests),
    (Outgoing, "resend", obeys_a_duplicate_resend),
    (Arrivals, "begin", takes_a_duplicate_of_corrupt_data),
    (Arrivals, "end", counts_duplicates_as_landed),
]


@pytest.mark.parametrize(("cls", "name", "mutant"), MUTANTS, ids=[f"{c.__name__}-{m.__name__}" for c, _, m in MUTANTS])
def test_each_mutant_is_caught(cls, name, mutant, monkeypatch):
    monkeypatch.setattr(cls, name, mutant(getattr(cls, name)))
    assert failing_seed(SEEDS) is not None, f"no seed below {SEEDS} catches it"


def test_a_heartbeat_that_counts_as_progress_is_caught(monkeypatch):
    monkeypatch.setattr(Outgoing, "heartbeat", takes_life_for_progress(Outgoing.heartbeat))
    monkeypatch.setattr(Incoming, "heartbeat", takes_life_for_progress_too(Incoming.heartbeat))
    assert failing_seed(SEEDS) is not None


# ---- the same of tickets with several sources or destinations


def completes_with_the_first_shard(real: Callable) -> Callable:
    def complete(self, now):
        several, self._num_sources = self._num_sources, 1
        standing = {peer: source for peer, source in self.sources.items() if source.stands}
        every, self.sources = self.sources, dict(list(standing.items())[:1])
        effects = real(self, now)
        self.sources, self._num_sources = every, several
        return effects

    return complete


def quiesces_with_the_first_source(_: Callable) -> Callable:
    def settle(self):
        if self.over or not any(source.quiet for source in self.sources.values()):
            return []
        self.over = True
        return [facts.Quiesced(self.ticket)]

    return settle


def takes_any_part_for_a_whole(_: Callable) -> Callable:
    return lambda pairs, all_here: None


def tells_the_first(kind: type) -> Callable[[Callable], Callable]:
    """What all parts must do is told when one has done it."""

    def mutant(real: Callable) -> Callable:
        def take(self, part, event):
            if not isinstance(event, kind):
                return real(self, part, event)
            real(self, part, event)
            first, self.told = not getattr(self, "told", False), True
            return [event] if first else []

        return take

    return mutant


def cancels_no_other_part(real: Callable) -> Callable:
    def take(self, part, event):
        return [e for e in real(self, part, event) if not isinstance(e, Cancel)]

    return take


def forgets_the_links_of_other_parts(real: Callable) -> Callable:
    """Pushes reach the first destination only."""
    return lambda self, ticket: real(self, ticket)[:1]


SHARD_MUTANTS = [
    (Incoming, "_complete_if_all_stand", completes_with_the_first_shard, (2, 1)),
    (Incoming, "_settle", quiesces_with_the_first_source, (2, 1)),
    (Incoming, "_settle", quiesces_with_the_first_source, (2, 2)),
    (SendJoint, "take", tells_the_first(facts.OpDone), (1, 2)),
    (SendJoint, "take", tells_the_first(facts.Granted), (1, 2)),
    (SendJoint, "take", cancels_no_other_part, (1, 2)),
    (Outbound, "_of", forgets_the_links_of_other_parts, (1, 2)),
    (ReceiveJoint, "take", tells_the_first(facts.Complete), (1, 2)),
    (ReceiveJoint, "take", tells_the_first(facts.Quiesced), (1, 2)),
]


@pytest.mark.parametrize(("cls", "name", "mutant", "shape"), SHARD_MUTANTS)
def test_each_mutant_of_shards_is_caught(cls, name, mutant, shape, monkeypatch):
    monkeypatch.setattr(cls, name, mutant(getattr(cls, name)))
    assert failing_seed(SHAPES[shape], shape) is not None


def test_an_overlapping_source_that_is_taken_is_caught(monkeypatch):
    monkeypatch.setattr(incoming, "flaw", takes_any_part_for_a_whole(incoming.flaw))
    assert failing_seed(200, (2, 1), overlap=True) is not None
