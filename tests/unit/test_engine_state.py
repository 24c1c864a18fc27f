"""The engine's state machine under seeded interleavings of its verbs, without threads, torch or a clock.

Whatever order requests come, join, fail and are aborted in: every sequence gets the tokens that it would get alone, the
ledger balances, nothing is left behind, and whoever sleeps is woken when there is something to do. The mutants at the
end put faults back; each must be caught.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest

from tercet.core import FinishReason, SamplingParams, Ticket, TokenEvent
from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.executor import Launched, LocalExecutor
from tercet.engine.loop import Engine
from tercet.engine.plan import PieceResult, StepPlan
from tercet.engine.report import Faulted, StepReport
from tercet.engine.scheduler import Scheduler
from tercet.engine.sequence import Phase, Sequence
from tercet.engine.state import EngineState
from tercet.errors import EngineFault, Overloaded
from tercet.spec import KvSpec, RoleSpec, SchedulerSpec
from tests.fakes.runner import VOCAB, FakeRunner, contents, next_token

SIZE = 8
CONTEXT = 90
STOP = 13  # an end-of-sequence token, which is ignored here


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < CONTEXT:
        tokens.append(next_token(tokens))
        if len(tokens) - len(prompt) >= max_tokens:
            break
    return tokens[len(prompt) :]


class Simulation:
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        blocks = rng.choice([12, 14, 20, 40])
        self.texts = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(3)]  # prompts begin alike
        budget, running = rng.choice([1, 3, 8, 16, 64]), rng.choice([1, 2, 4, 8, 8])
        spec = RoleSpec(
            kv=KvSpec(blocks=blocks, block_size=SIZE, prefix_cache=rng.random() < 0.7),
            scheduler=SchedulerSpec(token_budget=budget, max_running=running, max_waiting=4),
        )
        self.runner = FakeRunner(SIZE, self.push)
        self.executor = LocalExecutor(self.runner)
        self.woken = False
        self.engine = EngineState(spec, CONTEXT, (STOP,), rng.choice([2, 8]), self.wake)
        self.now = 0.0
        self.made: list[Sequence] = []
        self.got: dict[Sequence, list[int]] = {}
        self.faulted: set[Sequence] = set()
        self.reserved: list[Sequence] = []  # their KV is on its way
        self.quarantined: list[Sequence] = []
        self.sending: list[Sequence] = []  # handed over; a transfer reads their blocks
        self.pushed: dict[Ticket, list[int]] = {}
        self.asleep = False
        self.finishing = False
        self.stepped_ahead = 0
        self.ahead = rng.random() < 0.6
        self.launched: deque[Launched] = deque()

    def wake(self) -> None:
        self.woken = True

    # ---- what the roles do

    def push(self, ticket: Ticket, layer: int, first: int, blocks: list[int]) -> None:
        assert first == len(self.pushed[ticket]), "a block was left out or pushed twice"
        self.pushed[ticket] += blocks

    def report(self, report: StepReport) -> None:
        for item in report:
            if isinstance(item, Faulted):
                self.faulted.add(item.sequence)
            else:
                self.got.setdefault(item.sequence, []).append(item.token.token_id)

    def new(self) -> Sequence:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.choice([1, 2, 7, 8, 9, 16, 17, 33, 60])]
        counted = rng.choice([0.0, 0.0, 0.0, 0.5])  # a penalty takes tokens that are known
        params = SamplingParams(max_tokens=rng.choice([1, 2, 9, 60]), presence_penalty=counted, ignore_eos=True)
        sequence = Sequence(Ticket(f"r{len(self.made)}", 0, 1), prompt, len(prompt), params)
        self.made.append(sequence)
        self.runner.meet(sequence)
        self.now += 1
        return sequence

    def add(self) -> None:
        sequence = self.new()
        try:
            self.engine.add(sequence, self.now)
        except Overloaded:
            self.made.pop()

    def hand_over(self) -> None:
        sequence = self.new()
        sequence.hand_over = True
        self.pushed[sequence.ticket] = []
        try:
            self.engine.add(sequence, self.now)
            self.sending.append(sequence)
        except Overloaded:
            self.made.pop()

    def reserve(self) -> None:
        sequence = self.new()
        try:
            self.engine.reserve(sequence)
            self.reserved.append(sequence)
        except Overloaded:
            self.made.pop()

    def join(self) -> None:
        """All KV has landed: it stands in the leased blocks as the writer has computed it."""
        if self.reserved:
            sequence = self.reserved.pop(self.rng.randrange(len(self.reserved)))
            for at, content in enumerate(contents(sequence.token_ids)):
                self.runner.memory[sequence.blocks[at // SIZE], at % SIZE] = content
            first = next_token(sequence.token_ids)
            self.got[sequence] = [first]
            self.engine.join(sequence, first)

    def fail(self) -> None:
        if self.reserved:
            sequence = self.reserved.pop(self.rng.randrange(len(self.reserved)))
            self.faulted.add(sequence)
            if self.rng.random() < 0.6:
                self.engine.quarantine(sequence)
                self.quarantined.append(sequence)
            else:
                self.engine.release(sequence)

    def quiesce(self) -> None:
        if self.quarantined:
            self.engine.release(self.quarantined.pop(self.rng.randrange(len(self.quarantined))))

    def op_done(self) -> None:
        for sequence in self.sending:
            if sequence.over:
                self.sending.remove(sequence)
                self.engine.op_done(sequence)
                return

    def abort(self) -> None:
        if self.made:
            sequence = self.rng.choice(self.made)
            if not sequence.over:
                self.engine.abort(sequence)
                if sequence not in self.reserved:
                    self.faulted.add(sequence)

    # ---- the engine's thread

    def step(self) -> None:
        """The loop's next turn; while a step runs, verbs come in between."""
        self.woken = False
        plan = self.engine.plan(self.now)
        self.asleep = not plan.pieces and not self.launched
        if self.asleep:
            return
        self.meanwhile(3)
        if plan.pieces:
            self.launched.append(self.executor.launch(plan))
            self.stepped_ahead += len(self.launched) > 1
        if not plan.pieces or len(self.launched) > self.ahead:
            result = self.launched.popleft().result()
            self.meanwhile(2)
            self.report(self.engine.commit(result))

    def meanwhile(self, most: int) -> None:
        for _ in range(0 if self.finishing else self.rng.randrange(most)):
            self.rng.choice((self.abort, self.join, self.op_done))()

    def check(self) -> None:
        self.engine.check_integrity()
        for sequence in self.sending:
            for block in self.pushed[sequence.ticket]:
                assert self.engine._pool._held(block), "a block that is being sent is free"
        if self.asleep and not self.woken:
            assert not self.engine.plan(self.now).pieces, "there is something to do, and nobody wakes the engine"

    def run(self) -> None:
        adds = (self.add,), (self.hand_over,), (self.reserve, self.reserve), (self.add, self.hand_over, self.reserve)
        verbs = (*self.rng.choice(adds), self.join, self.fail, self.quiesce, self.op_done, self.abort)
        for _ in range(60):
            if self.asleep and not self.woken:
                self.rng.choice(verbs)()
            else:
                self.rng.choice((self.step, self.step, *verbs))()
            self.check()
        self.finish()

    def finish(self) -> None:
        """No new request: all that is here ends, and leaves nothing behind."""
        self.finishing = True
        for _ in range(3000):
            for verb in (self.join, self.quiesce, self.op_done):
                verb()
            if not (self.asleep and not self.woken):
                self.step()
            elif not (self.reserved or self.quarantined or any(s.over for s in self.sending)):
                break
        else:
            raise AssertionError("the engine does not come to rest")
        for sequence in self.made:
            assert sequence.phase is Phase.OVER, f"{sequence.ticket} is left {sequence.phase}"
            if sequence in self.faulted:
                continue
            if sequence.hand_over:
                assert self.got[sequence] == [next_token(sequence.token_ids)]
                assert len(self.pushed[sequence.ticket]) == -(-len(sequence.token_ids) // SIZE), (
                    "blocks were not pushed"
                )
            else:
                prompt = sequence.token_ids[: sequence.num_prompt]
                assert self.got[sequence] == expected(prompt, sequence.params.max_tokens), sequence.ticket
        self.engine.check_integrity()
        load = self.engine.load()
        assert load.blocks_free == load.blocks_total, f"leak: {load}"
        assert load.running == load.waiting == 0, load


SEEDS = 2000


def failing_seed(seeds: int = SEEDS) -> int | None:
    for seed in range(seeds):
        try:
            Simulation(seed).run()
        except (AssertionError, KeyError, IndexError, ValueError):
            return seed
    return None


@pytest.mark.parametrize("seeds", [range(600), pytest.param(range(600, SEEDS), marks=pytest.mark.slow)], ids=str)
def test_no_interleaving_breaks_the_engine(seeds):
    for seed in seeds:
        try:
            Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_every_end_is_reached():
    seen = {"preempted": 0, "cached": 0, "joined": 0, "handed over": 0, "asleep": 0, "quarantined": 0, "ahead": 0}
    for seed in range(600):
        simulation = Simulation(seed)
        simulation.run()
        seen["preempted"] += simulation.engine._scheduler.preemptions
        seen["cached"] += sum(s.cached_tokens > 0 for s in simulation.made)
        seen["handed over"] += sum(s.hand_over and s in simulation.got for s in simulation.made)
        seen["joined"] += len(simulation.got)
        seen["asleep"] += simulation.asleep
        seen["ahead"] += simulation.stepped_ahead
        seen["quarantined"] += len(simulation.faulted)
    assert min(seen.values()) > 50, seen


# ---- mutants: (where, method, what it does wrong)


def infers_decoding_from_one_pending_token(real: Callable) -> Callable:
    """What is left of a prompt after its chunks may be one token, too."""

    def choose(self):
        for sequence in self.running:
            if sequence.phase is Phase.PREFILLING and sequence.pending == 1:
                sequence.phase = Phase.DECODING
        return real(self)

    return choose


def forgets_to_wake(real: Callable) -> Callable:
    def release(self, blocks, hold):
        woken, self._on_free = self._on_free, lambda: None
        try:
            real(self, blocks, hold)
        finally:
            self._on_free = woken

    return release


def frees_what_a_step_reads(_: Callable) -> Callable:
    def retire(self, sequence):
        sequence.phase = Phase.OVER
        self._scheduler.remove(sequence)
        self._give_back(sequence)

    return retire


def frees_what_is_being_sent(_: Callable) -> Callable:
    def give_back(self, sequence):
        self._pool.release(sequence.blocks, Hold.OWNED)
        sequence.blocks = []

    return give_back


def publishes_what_is_not_computed(real: Callable) -> Callable:
    """The blocks of a prompt are offered when it starts."""

    def publish(self, sequence):
        computed, sequence.computed = sequence.computed, len(sequence.blocks) * SIZE
        real(self, sequence)
        sequence.computed = computed

    return publish


def forgets_steps_in_flight(_: Callable) -> Callable:
    """What a step in flight uses is given back."""
    return lambda self, sequence: False


def never_waits_for_the_step_in_flight(_: Callable) -> Callable:
    return lambda self: False


def draws_ahead_past_the_last_token(_: Callable) -> Callable:
    return lambda self, sequence: sequence.decodes


def leaks_the_match_of_who_must_wait(real: Callable) -> Callable:
    """A prompt that finds no room for the rest keeps the cached blocks, and asks for them again with each step."""

    def start(self, sequence):
        release, self.pool.release = self.pool.release, lambda *_: None
        try:
            return real(self, sequence)
        finally:
            self.pool.release = release

    return start


def leaks_the_hits_of_a_failed_handover(_: Callable) -> Callable:
    def quarantine(self, sequence):
        self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.QUARANTINED)
        self._reserved.remove(sequence)
        sequence.phase = Phase.QUARANTINED

    return quarantine


def matches_the_whole_prompt(_: Callable) -> Callable:
    """Then there is no token left whose logits are computed."""

    def start(self, sequence):
        matched = self.index.find(sequence.extend_hashes(self.block_size))
        self.pool.share(matched)
        rest = self._blocks_of(len(sequence.token_ids)) - len(matched)
        if rest > self.pool.available and (self.running or sequence.hand_over):
            self.pool.release(matched, Hold.OWNED)
            return False
        sequence.blocks, sequence.computed, sequence.published = matched, len(matched) * self.block_size, len(matched)
        if sequence.hand_over:
            sequence.blocks = matched + self.pool.allocate(rest, Hold.OWNED)
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.phase = Phase.PREFILLING
        return True

    return start


def pushes_only_full_blocks(_: Callable) -> Callable:
    def push_of(self, sequence, length, last):
        if not sequence.hand_over:
            return range(0)
        return range(sequence.pushed_blocks, (sequence.computed + length) // self.block_size)

    return push_of


def joins_without_its_blocks(real: Callable) -> Callable:
    """The leases stay leases."""

    def move(self, blocks, source, target):
        if (source, target) != (Hold.LEASED, Hold.OWNED):
            real(self, blocks, source, target)

    return move


def releases_a_lease_twice(real: Callable) -> Callable:
    def release(self, sequence, verified=0):
        blocks = sequence.blocks
        real(self, sequence, verified)
        if blocks[sequence.published :]:
            self._pool.release(blocks[sequence.published :], Hold.LEASED)

    return release


def decodes_behind_the_end(_: Callable) -> Callable:
    return lambda self, eos, max_context: None


MUTANTS = [
    (EngineState, "_touched", forgets_steps_in_flight),
    (Scheduler, "_must_wait", never_waits_for_the_step_in_flight),
    (Scheduler, "_goes_on", draws_ahead_past_the_last_token),
    (Scheduler, "_choose", infers_decoding_from_one_pending_token),
    (BlockPool, "release", forgets_to_wake),
    (EngineState, "_retire", frees_what_a_step_reads),
    (EngineState, "_give_back", frees_what_is_being_sent),
    (EngineState, "_publish", publishes_what_is_not_computed),
    (Scheduler, "_start", leaks_the_match_of_who_must_wait),
    (EngineState, "quarantine", leaks_the_hits_of_a_failed_handover),
    (Scheduler, "_start", matches_the_whole_prompt),
    (Scheduler, "_push_of", pushes_only_full_blocks),
    (BlockPool, "move", joins_without_its_blocks),
    (EngineState, "release", releases_a_lease_twice),
    (Sequence, "finish_reason", decodes_behind_the_end),
]


@pytest.mark.parametrize(("cls", "name", "mutant"), MUTANTS, ids=[m.__name__ for _, _, m in MUTANTS])
def test_each_mutant_is_caught(cls, name, mutant, monkeypatch):
    monkeypatch.setattr(cls, name, mutant(getattr(cls, name)))
    assert failing_seed() is not None


# ---- single cases


class Alone:
    """An engine state, stepped by hand."""

    def __init__(self, blocks: int = 20, budget: int = 16, running: int = 4) -> None:
        spec = RoleSpec(
            kv=KvSpec(blocks=blocks, block_size=SIZE),
            scheduler=SchedulerSpec(token_budget=budget, max_running=running, max_waiting=8),
        )
        self.runner = FakeRunner(SIZE)
        self.state = EngineState(spec, CONTEXT, (STOP,), 8, lambda: None)
        self.reports: StepReport = []

    def add(self, number: int, prompt: list[int], max_tokens: int = 5) -> Sequence:
        sequence = sequence_of(number, prompt, max_tokens)
        self.runner.meet(sequence)
        self.state.add(sequence, 0.0)
        return sequence

    def step(self) -> StepPlan:
        plan = self.state.plan(0.0)
        if plan.pieces:
            self.reports += self.state.commit(LocalExecutor(self.runner).launch(plan).result())
        return plan

    def run(self) -> None:
        while self.step().pieces:
            pass

    def all_free(self) -> bool:
        load = self.state.load()
        return load.blocks_free == load.blocks_total

    def fails_on(self, token: int) -> None:
        """Every step with a sequence that begins with this token."""
        tokens = self.runner.tokens
        self.runner.fails = lambda plan: any(tokens[piece.ticket][0] == token for piece in plan.pieces)


def sequence_of(number: int, prompt: list[int], max_tokens: int = 5) -> Sequence:
    return Sequence(Ticket(f"r{number}", 0, 1), list(prompt), len(prompt), SamplingParams(max_tokens=max_tokens))


def test_an_abort_of_the_first_in_line_wakes_the_engine():
    """It waited for blocks that a transfer holds, and the one behind it needs none of them. Hardly an interleaving of
    those above comes to this."""
    woken: list[bool] = []
    spec = RoleSpec(kv=KvSpec(blocks=4, block_size=SIZE), scheduler=SchedulerSpec(max_running=8))
    state = EngineState(spec, CONTEXT, (STOP,), 8, lambda: woken.append(True))
    state.reserve(sequence_of(0, [1] * 3 * SIZE))
    large, small = sequence_of(1, [2] * 2 * SIZE), sequence_of(2, [3] * SIZE)
    for sequence in (large, small):
        sequence.hand_over = True
        state.add(sequence, 0.0)
    assert not state.plan(0.0).pieces
    woken.clear()
    state.abort(large)
    assert woken
    assert [piece.ticket for piece in state.plan(0.0).pieces] == [small.ticket]


def test_a_newcomer_does_not_take_what_the_preempted_wait_for():
    engine = Alone(blocks=8, running=8)
    for number in range(3):
        engine.add(number, [number] * 20, max_tokens=40)
    while not engine.state._scheduler.waiting:
        engine.step()
    waiting = engine.state._scheduler.waiting[0]
    assert engine.state._pool.available > 0
    with pytest.raises(Overloaded, match="for requests that are here already"):
        engine.state.reserve(sequence_of(9, [1] * 8))
    engine.run()
    assert waiting.phase is Phase.OVER


def test_one_sequence_at_fault_ends_and_the_others_go_on():
    engine = Alone()
    engine.fails_on(3)
    for number in (1, 2, 3, 4):
        engine.add(number, [number] * 9)
    engine.run()
    faults = [item for item in engine.reports if isinstance(item, Faulted)]
    assert [item.sequence.ticket.request_id for item in faults] == ["r3"]
    assert isinstance(faults[0].error, EngineFault)
    assert "this step fails" in str(faults[0].error)
    for number in (1, 2, 4):
        reports = [i for i in engine.reports if not isinstance(i, Faulted) and i.sequence.ticket[0] == f"r{number}"]
        assert [item.token.token_id for item in reports] == expected([number] * 9, 5)
    assert engine.all_free()


def test_what_a_faulty_sequence_computed_is_no_prefix_for_others():
    engine = Alone(budget=8)
    engine.runner.fails = lambda plan: any(piece.start >= 16 for piece in plan.pieces)
    engine.add(1, [1] * 20)
    engine.run()
    engine.runner.fails = lambda _: False
    again = engine.add(2, [1] * 20)
    engine.run()
    assert again.cached_tokens == 0


@pytest.mark.parametrize("running", [1, 8])
def test_however_many_are_at_fault_the_engine_lives(running):
    """One after the other, or all of a step."""
    engine = Alone(running=running, budget=100)
    engine.fails_on(3)
    for number in range(8):
        engine.add(number, [3, number])
    engine.run()
    assert [type(item) for item in engine.reports] == [Faulted] * 8
    engine.reports.clear()
    engine.add(9, [1, 2])
    engine.run()
    assert len(engine.reports) == 5
    assert engine.all_free()


@pytest.mark.parametrize("number", [1, 3])
def test_an_engine_that_is_broken_dies(number):
    """Else it would fail request after request behind a good health."""
    engine = Alone()
    engine.runner.broken = True
    for at in range(number):
        engine.add(at, [at] * 5)
    with pytest.raises(RuntimeError, match="the model fails"):
        engine.run()


def test_a_step_may_bring_several_tokens():
    """As a draft that was accepted would: all are taken, up to the one that ends the sequence."""
    engine = Alone()
    sequence = engine.add(1, [1, 2, 3], max_tokens=3)
    engine.state.plan(0.0)
    tokens = [TokenEvent(token) for token in (5, 6, 7, 8)]
    report = engine.state.commit([PieceResult(tokens)])
    assert [item.token.token_id for item in report] == [5, 6, 7]
    assert [item.token.finish for item in report] == [None, None, FinishReason.LENGTH]
    assert sequence.token_ids == [1, 2, 3, 5, 6, 7]
    assert engine.all_free()


def test_ids_that_the_model_does_not_have():
    engine = Engine(LocalExecutor(FakeRunner(SIZE)), RoleSpec(), CONTEXT, (STOP,), 8, id)
    engine.check_ids(range(VOCAB))
    for ids in ([VOCAB], [0, -1], [2**31, 0]):
        with pytest.raises(Exception, match="outside the model's vocabulary"):
            engine.check_ids(ids)


def test_decodes_do_not_starve_prompts():
    """More decodes than the budget has tokens: a prompt still gets on."""
    engine = Alone(blocks=80, budget=2, running=8)
    for number in range(6):
        engine.add(number, [number], max_tokens=60)
    for _ in range(20):
        engine.step()
    assert all(s.phase is not Phase.WAITING for s in engine.state._scheduler.running)
    assert engine.runner.largest <= 6
