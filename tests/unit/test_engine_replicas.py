"""Data replicas as one state, with a random order of its verbs: every sequence gets the tokens that it would get alone,
on one replica from its beginning to its end."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable

import pytest

from tercet.core import SamplingParams, Ticket, TokenEvent
from tercet.engine.plan import PieceResult, StepPlan, StepResult, pack, unpack
from tercet.engine.replicas import SUMMED, Replicas, replica_of
from tercet.engine.report import StepReport
from tercet.engine.sequence import Sequence
from tercet.engine.state import EngineState
from tercet.errors import Overloaded, WorkerDrained
from tercet.spec import KvSpec, RoleSpec, SchedulerSpec
from tests.fakes.runner import VOCAB, FakeRunner, contents, next_token
from tests.unit.test_engine_plan import piece_of, plain

SIZE = 8


class Simulation:
    """Each replica has a runner of its own, as it has ranks of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        count = rng.choice([1, 2, 3, 4])
        spec = RoleSpec(
            kv=KvSpec(blocks=20, block_size=SIZE),
            scheduler=SchedulerSpec(token_budget=rng.choice([3, 16, 64]), max_running=4, max_waiting=4),
        )
        self.states = [EngineState(spec, 90, (), 2, lambda: None) for _ in range(count)]
        self.runners = [FakeRunner(SIZE) for _ in range(count)]
        self.replicas = Replicas(count, iter(self.states).__next__)
        self.made: list[Sequence] = []
        self.reserved: list[Sequence] = []
        self.handed_over: list[Sequence] = []
        self.aborted: set[Sequence] = set()
        self.got: dict[Sequence, list[int]] = {}
        self.replica_at_first: dict[Sequence, int] = {}
        self.replica_of = {id(state): number for number, state in enumerate(self.states)}
        self.idle_steps = 0  # of replicas, while others computed

    def new(self, *, hand_over: bool = False) -> Sequence:
        prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.choice([1, 7, 8, 17, 40]))]
        params = SamplingParams(max_tokens=self.rng.choice([1, 2, 9]), ignore_eos=True)
        ticket = Ticket(f"r{len(self.made)}", 0, 1)
        return Sequence(ticket, prompt, len(prompt), params, hand_over=hand_over)

    def at(self, sequence: Sequence) -> int:
        return self.replica_of[id(sequence.state)]

    def met(self, sequence: Sequence) -> None:
        self.made.append(sequence)
        self.got[sequence] = []
        self.replica_at_first[sequence] = self.at(sequence)
        self.runners[self.at(sequence)].meet(sequence)

    def add(self) -> None:
        self._try(self.new(), lambda sequence: self.replicas.add(sequence, 0.0))

    def hand_over(self) -> None:
        sequence = self.new(hand_over=True)
        if self._try(sequence, lambda sequence: self.replicas.add(sequence, 0.0)):
            assert self.at(sequence) == replica_of(sequence.ticket, len(self.states))
            self.handed_over.append(sequence)

    def reserve(self) -> None:
        sequence = self.new()
        if self._try(sequence, self.replicas.reserve):
            assert self.at(sequence) == replica_of(sequence.ticket, len(self.states))
            self.reserved.append(sequence)

    def _try(self, sequence: Sequence, verb: Callable[[Sequence], object]) -> bool:
        try:
            verb(sequence)
        except Overloaded:
            return False
        self.met(sequence)
        return True

    def join(self) -> None:
        if self.reserved:
            sequence = self.reserved.pop(self.rng.randrange(len(self.reserved)))
            for at, content in enumerate(contents(sequence.token_ids)):
                self.runners[self.at(sequence)].memory[sequence.blocks[at // SIZE], at % SIZE] = content
            self.got[sequence].append(next_token(sequence.token_ids))
            self.replicas.join(sequence, self.got[sequence][0])

    def abort(self) -> None:
        running = [s for s in self.made if not s.over and s not in self.reserved and s not in self.handed_over]
        if running:
            sequence = self.rng.choice(running)
            self.replicas.abort(sequence)
            self.aborted.add(sequence)

    def step(self) -> bool:
        plan = self.replicas.plan(0.0)
        if not plan.pieces:
            return False
        result: StepResult = []
        for runner, its in zip(self.runners, plan.replicas, strict=True):
            self.idle_steps += not its.pieces
            if its.pieces:
                result += runner.launch(its).result()
        self.report(self.replicas.commit(result))
        return True

    def report(self, report: StepReport) -> None:
        for item in report:
            self.got[item.sequence].append(item.token.token_id)
            if item.sequence in self.handed_over:
                self.handed_over.remove(item.sequence)
                self.replicas.op_done(item.sequence)

    def check(self) -> None:
        self.replicas.check_integrity()
        load, loads = self.replicas.load(), [state.load() for state in self.states]
        for name in SUMMED:
            assert getattr(load, name) == sum(getattr(each, name) for each in loads), name

    def run(self) -> None:
        for _ in range(60):
            self.rng.choice((self.step, self.step, self.add, self.hand_over, self.reserve, self.join, self.abort))()
            self.check()
        while self.step() or self.reserved:
            self.join()
        self.check()
        load = self.replicas.load()
        assert (load.blocks_free, load.running, load.waiting) == (load.blocks_total, 0, 0)
        for sequence in self.made:
            assert self.at(sequence) == self.replica_at_first[sequence]
            if sequence not in self.aborted:
                assert self.got[sequence] == self.expected(sequence), sequence.ticket

    @staticmethod
    def expected(sequence: Sequence) -> list[int]:
        tokens = sequence.token_ids[: sequence.num_prompt]
        for _ in range(1 if sequence.hand_over else sequence.params.max_tokens):
            tokens.append(next_token(tokens))
        return tokens[sequence.num_prompt :]


def test_every_result_reaches_the_sequence_that_it_belongs_to():
    idle = finished = 0
    for seed in range(80):
        simulation = Simulation(seed)
        simulation.run()
        idle += simulation.idle_steps
        finished += len(simulation.made) - len(simulation.aborted)
    assert idle > 200
    assert finished > 300


def test_results_in_another_order_are_noticed(monkeypatch):
    """So that the test above can fail."""
    real = Replicas.commit
    monkeypatch.setattr(Replicas, "commit", lambda self, result: real(self, result[::-1]))
    several = next(seed for seed in range(30) if len(Simulation(seed).states) > 2)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        Simulation(several).run()


def test_a_request_that_is_not_handed_over_goes_where_fewest_are():
    simulation = Simulation(0)
    simulation.replicas = Replicas(len(simulation.states), iter(simulation.states).__next__)
    count = len(simulation.states)
    assert count > 1
    for _ in range(3 * count):
        simulation.add()
    assert set(Counter(map(simulation.at, simulation.made)).values()) == {3}


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
def test_tickets_are_spread_evenly(replicas):
    counts = Counter(replica_of(Ticket(f"request-{number}", 0, 1), replicas) for number in range(1000))
    assert counts.keys() == {*range(replicas)}
    assert max(counts.values()) - min(counts.values()) <= 0.4 * 1000 / replicas


def test_a_ticket_goes_to_the_same_replica_whichever_epoch_decodes_it():
    for number in range(100):
        assert replica_of(Ticket(f"r{number}", 2, 1), 5) == replica_of(Ticket(f"r{number}", 2, 9), 5)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_of_several_replicas_goes_through_a_pipe(seed):
    rng = random.Random(seed)

    def some() -> StepPlan:
        decodes, chunks = ([piece_of(rng) for _ in range(rng.randrange(3))] for _ in range(2))
        return StepPlan(decodes, chunks, [1, 2][: rng.randrange(3)])

    plan = some()._replace(others=[some() for _ in range(rng.randrange(4))])
    back = unpack(pack(plan))
    assert plain(back) == plain(plan)
    assert plain(back.replicas) == plain(plan.replicas)
    assert len(back.pieces) == sum(len(its.decodes) + len(its.chunks) for its in plan.replicas)


def test_no_plan_is_in_flight_where_no_replica_has_a_piece():
    replicas = Simulation(1).replicas
    assert replicas.plan(0.0) == StepPlan()
    with pytest.raises(IndexError):
        replicas.commit([PieceResult()])


def test_a_lost_replica_ends_what_it_has_and_comes_back_empty():
    simulation = Simulation(1)
    spec = RoleSpec(kv=KvSpec(blocks=20, block_size=SIZE), scheduler=SchedulerSpec(max_running=4, max_waiting=4))
    states = [EngineState(spec, 90, (), 2, lambda: None) for _ in range(3)]
    replicas = Replicas(2, iter(states).__next__)
    made = [simulation.new() for _ in range(6)]
    for sequence in made[:4]:
        replicas.add(sequence, 0.0)
    lost = [sequence for sequence in made[:4] if sequence.state is states[1]]
    plan = replicas.plan(0.0)
    replicas.lose(1)
    assert (replicas.load().blocks_total, replicas.load().ranks_lost, replicas.load().rank_losses) == (20, 1, 1)
    assert [item.sequence for item in replicas.evicted()] == lost
    assert replicas.evicted() == []
    for sequence in made[4:]:
        replicas.add(sequence, 0.0)
        assert sequence.state is states[0]
    tokens = [PieceResult((TokenEvent(1),)) for _ in plan.replicas[0].pieces]
    faults = [PieceResult(fault=WorkerDrained("gone")) for _ in plan.replicas[1].pieces]
    report = replicas.commit([*tokens, *faults])
    assert not {item.sequence for item in report} & {*lost}
    replicas.restore(1)
    back = simulation.new()
    replicas.add(back, 0.0)
    assert back.state is states[2]  # its memory is new: nothing of what its blocks held is found
    replicas.check_integrity()
    load = replicas.load()
    assert (load.blocks_total, load.ranks_lost, load.rank_losses) == (40, 0, 1)


def test_a_request_that_ends_before_it_is_added_holds_nothing():
    """Its offer was refused, say."""
    simulation = Simulation(3)
    sequence = simulation.new(hand_over=True)
    simulation.replicas.abort(sequence)
    simulation.replicas.op_done(sequence)
    assert sequence.over
    simulation.check()


def test_counters_do_not_fall_when_a_replica_is_lost_or_comes_back():
    spec = RoleSpec(kv=KvSpec(blocks=4, block_size=SIZE))
    states = [EngineState(spec, 90, (), 2, lambda: None) for _ in range(3)]
    replicas = Replicas(2, iter(states).__next__)
    states[1]._scheduler.preemptions = 5
    found = [replicas.load().preemptions]
    for verb in (replicas.lose, replicas.restore, replicas.lose):
        verb(1)
        found.append(replicas.load().preemptions)
    assert found == [5, 5, 5, 5]


def test_what_a_lost_replica_had_is_told_also_once_it_is_back():
    simulation = Simulation(1)
    spec = RoleSpec(kv=KvSpec(blocks=20, block_size=SIZE))
    replicas = Replicas(2, lambda: EngineState(spec, 90, (), 2, lambda: None))
    made = [simulation.new() for _ in range(2)]
    for sequence in made:
        replicas.add(sequence, 0.0)
    replicas.lose(1)
    replicas.restore(1)
    assert [item.sequence for item in replicas.evicted()] == made[1:]
    assert replicas.evicted() == []
    old = weakref.ref(made.pop().state)
    del sequence, simulation
    assert old() is None  # many comebacks leave nothing behind


@pytest.mark.parametrize("attempt", range(4))
def test_the_next_attempt_gets_another_replica(attempt):
    for number in range(50):
        now, then = (Ticket(f"r{number}", each, 1) for each in (attempt, attempt + 1))
        assert replica_of(now, 3) != replica_of(then, 3)


def test_what_would_go_to_a_lost_replica_goes_on_elsewhere():
    simulation = Simulation(1)
    spec = RoleSpec(kv=KvSpec(blocks=20, block_size=SIZE))
    replicas = Replicas(2, lambda: EngineState(spec, 90, (), 2, lambda: None))
    replicas.lose(0)
    sequence = simulation.new()
    sequence.ticket = next(t for t in (Ticket("r", each, 1) for each in (0, 1)) if replica_of(t, 2) == 0)
    with pytest.raises(WorkerDrained, match="the rank of replica 0 is lost"):
        replicas.reserve(sequence)
