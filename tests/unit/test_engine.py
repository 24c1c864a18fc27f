"""The engine's state machine under seeded interleavings of its verbs, without threads, torch or a clock.

Whatever order requests come, join, fail and are aborted in: every sequence gets the tokens that it would get alone, the
ledger balances, nothing is left behind, and whoever sleeps is woken when there is something to do. The mutants at the
end put faults back; each must be caught.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tercet.core import SamplingParams
from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.engine import Engine, Faulted
from tercet.engine.scheduler import Scheduler
from tercet.engine.sequence import Phase, Sequence
from tercet.errors import EngineFault, Overloaded
from tercet.spec import KvSpec, RoleSpec, SchedulerSpec
from tercet.transfer.protocol.messages import Ticket
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


class Condition:
    """Stands for the engine's condition: whether a sleeper would have been woken."""

    def __init__(self, lock) -> None:
        self._lock = lock
        self.woken = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify(self) -> None:
        assert self._lock.locked(), "notified without the lock"
        self.woken = True


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
        self.runner = FakeRunner(SIZE)
        self.engine = Engine(self.runner, spec, CONTEXT, (STOP,), rng.choice([2, 8]), self.report)
        self.condition = self.engine._work = Condition(self.engine._lock)
        self.engine._pool._on_free = self.condition.notify
        self.budget = budget
        self.made: list[Sequence] = []
        self.got: dict[Sequence, list[int]] = {}
        self.faulted: set[Sequence] = set()
        self.reserved: list[Sequence] = []  # their KV is on its way
        self.quarantined: list[Sequence] = []
        self.sending: list[Sequence] = []  # handed over; a transfer reads their blocks
        self.pushed: dict[Ticket, list[int]] = {}
        self.asleep = False
        self.finishing = False

    # ---- what the roles do

    def push(self, ticket: Ticket, layer: int, first: int, blocks: list[int]) -> None:
        assert first == len(self.pushed[ticket]), "a block was left out or pushed twice"
        self.pushed[ticket] += blocks

    def report(self, report) -> None:
        for item in report:
            if isinstance(item, Faulted):
                self.faulted.add(item.sequence)
            else:
                self.got.setdefault(item.sequence, []).append(item.token.token_id)

    def new(self) -> Sequence:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.choice([1, 2, 7, 8, 9, 16, 17, 33, 60])]
        params = SamplingParams(max_tokens=rng.choice([1, 2, 9, 60]), ignore_eos=True)
        sequence = Sequence(Ticket(f"r{len(self.made)}", 0, 1), prompt, len(prompt), params)
        self.made.append(sequence)
        return sequence

    def add(self) -> None:
        sequence = self.new()
        try:
            self.engine.add(sequence)
        except Overloaded:
            self.made.pop()

    def hand_over(self) -> None:
        sequence = self.new()
        sequence.handoff = self
        self.pushed[sequence.ticket] = []
        try:
            self.engine.add(sequence)
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
        with self.engine._lock:
            step = self.engine._begin_step()
        self.asleep = not step
        if self.asleep:
            self.condition.woken = False
            return
        for _ in range(0 if self.finishing else self.rng.randrange(3)):
            self.rng.choice((self.abort, self.join, self.op_done))()
        self.engine._run(step)

    def check(self) -> None:
        self.engine.check_integrity()
        for sequence in self.sending:
            for block in self.pushed[sequence.ticket]:
                assert self.engine._pool._held(block), "a block that is being sent is free"
        if self.asleep and not self.condition.woken:
            with self.engine._lock:
                step = self.engine._scheduler.schedule()
            assert not step, "there is something to do, and nobody wakes the engine"

    def run(self) -> None:
        adds = (self.add,), (self.hand_over,), (self.reserve, self.reserve), (self.add, self.hand_over, self.reserve)
        verbs = (*self.rng.choice(adds), self.join, self.fail, self.quiesce, self.op_done, self.abort)
        for _ in range(60):
            if self.asleep and not self.condition.woken:
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
            if not (self.asleep and not self.condition.woken):
                self.step()
            elif not (self.reserved or self.quarantined or any(s.over for s in self.sending)):
                break
        else:
            raise AssertionError("the engine does not come to rest")
        for sequence in self.made:
            assert sequence.phase is Phase.OVER, f"{sequence.ticket} is left {sequence.phase}"
            if sequence in self.faulted:
                continue
            if sequence.handoff is not None:
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


def test_no_interleaving_breaks_the_engine():
    for seed in range(SEEDS):
        try:
            Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_every_end_is_reached():
    seen = {"preempted": 0, "cached": 0, "joined": 0, "handed over": 0, "asleep": 0, "quarantined": 0}
    for seed in range(300):
        simulation = Simulation(seed)
        simulation.run()
        seen["preempted"] += simulation.engine._scheduler.preemptions
        seen["cached"] += sum(s.cached_tokens > 0 for s in simulation.made)
        seen["handed over"] += sum(s.handoff is not None and s in simulation.got for s in simulation.made)
        seen["joined"] += len(simulation.got)
        seen["asleep"] += simulation.asleep
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


def wakes_nobody_when_a_place_is_free(real: Callable) -> Callable:
    def abort(self, sequence):
        notify, self._work.notify = self._work.notify, lambda: None
        try:
            real(self, sequence)
        finally:
            self._work.notify = notify

    return abort


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
        with self._lock:
            self._pool.move(sequence.blocks[sequence.published :], Hold.LEASED, Hold.QUARANTINED)
            self._reserved.remove(sequence)
            sequence.phase = Phase.OVER

    return quarantine


def matches_the_whole_prompt(_: Callable) -> Callable:
    """Then there is no token left whose logits are computed."""

    def start(self, sequence):
        matched = self.pool.match(sequence.extend_hashes(self.block_size))
        rest = self._blocks_of(len(sequence.token_ids)) - len(matched)
        if rest > self.pool.available and (self.running or sequence.handoff):
            self.pool.release(matched, Hold.OWNED)
            return False
        sequence.blocks, sequence.computed, sequence.published = matched, len(matched) * self.block_size, len(matched)
        if sequence.handoff is not None:
            sequence.blocks = matched + self.pool.allocate(rest, Hold.OWNED)
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.phase = Phase.PREFILLING
        return True

    return start


def pushes_only_full_blocks(_: Callable) -> Callable:
    def push_of(self, sequence, length, last):
        if sequence.handoff is None:
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
    (Scheduler, "_choose", infers_decoding_from_one_pending_token),
    (BlockPool, "release", forgets_to_wake),
    (Engine, "abort", wakes_nobody_when_a_place_is_free),
    (Engine, "_retire", frees_what_a_step_reads),
    (Engine, "_give_back", frees_what_is_being_sent),
    (Engine, "_publish", publishes_what_is_not_computed),
    (Scheduler, "_start", leaks_the_match_of_who_must_wait),
    (Engine, "quarantine", leaks_the_hits_of_a_failed_handover),
    (Scheduler, "_start", matches_the_whole_prompt),
    (Scheduler, "_push_of", pushes_only_full_blocks),
    (BlockPool, "move", joins_without_its_blocks),
    (Engine, "release", releases_a_lease_twice),
    (Sequence, "finish_reason", decodes_behind_the_end),
]


@pytest.mark.parametrize(("cls", "name", "mutant"), MUTANTS, ids=[m.__name__ for _, _, m in MUTANTS])
def test_each_mutant_is_caught(cls, name, mutant, monkeypatch):
    monkeypatch.setattr(cls, name, mutant(getattr(cls, name)))
    assert failing_seed() is not None


# ---- single cases


def engine_of(blocks: int = 20, budget: int = 16, running: int = 4) -> tuple[Engine, FakeRunner, list]:
    spec = RoleSpec(
        kv=KvSpec(blocks=blocks, block_size=SIZE),
        scheduler=SchedulerSpec(token_budget=budget, max_running=running, max_waiting=8),
    )
    runner, reports = FakeRunner(SIZE), []
    return Engine(runner, spec, CONTEXT, (STOP,), 8, reports.extend), runner, reports


def sequence_of(number: int, prompt: list[int], max_tokens: int = 5) -> Sequence:
    return Sequence(Ticket(f"r{number}", 0, 1), prompt, len(prompt), SamplingParams(max_tokens=max_tokens))


def run_until_idle(engine: Engine) -> None:
    while True:
        with engine._lock:
            step = engine._begin_step()
        if not step:
            return
        engine._run(step)


def test_a_newcomer_does_not_take_what_the_preempted_wait_for():
    engine, _, _ = engine_of(blocks=8, running=8)
    for number in range(3):
        engine.add(sequence_of(number, [number] * 20, max_tokens=40))
    while not engine._scheduler.waiting:
        with engine._lock:
            step = engine._begin_step()
        engine._run(step)
    waiting = engine._scheduler.waiting[0]
    assert engine._pool.available > 0
    with pytest.raises(Overloaded, match="for requests that are here already"):
        engine.reserve(sequence_of(9, [1] * 8))
    run_until_idle(engine)
    assert waiting.phase is Phase.OVER


def test_one_sequence_at_fault_ends_and_the_others_go_on():
    engine, runner, reports = engine_of()
    runner.fails = lambda step: any(s.token_ids[0] == 3 for s in step.sequences)
    prompts = {n: [n] * 9 for n in (1, 2, 3, 4)}
    for number, prompt in prompts.items():
        engine.add(sequence_of(number, list(prompt)))
    run_until_idle(engine)
    faults = [item for item in reports if isinstance(item, Faulted)]
    assert [item.sequence.ticket.request_id for item in faults] == ["r3"]
    assert isinstance(faults[0].error, EngineFault)
    assert "this step fails" in str(faults[0].error)
    for number in (1, 2, 4):
        got = [i.token.token_id for i in reports if not isinstance(i, Faulted) and i.sequence.ticket[0] == f"r{number}"]
        assert got == expected(prompts[number], 5)
    assert engine.load().blocks_free == engine.load().blocks_total


def test_what_a_faulty_sequence_computed_is_no_prefix_for_others():
    engine, runner, _ = engine_of(budget=8)
    runner.fails = lambda step: any(s.computed >= 16 for s in step.sequences)
    engine.add(sequence_of(1, [1] * 20))
    run_until_idle(engine)
    runner.fails = lambda _: False
    again = sequence_of(2, [1] * 20)
    engine.add(again)
    run_until_idle(engine)
    assert again.cached_tokens == 0


@pytest.mark.parametrize("running", [1, 8])
def test_however_many_are_at_fault_the_engine_lives(running):
    """One after the other, or all of a step."""
    engine, runner, reports = engine_of(running=running, budget=100)
    runner.fails = lambda step: any(s.token_ids[0] == 3 for s in step.sequences)
    for number in range(8):
        engine.add(sequence_of(number, [3, number]))
    run_until_idle(engine)
    assert [type(item) for item in reports] == [Faulted] * 8
    reports.clear()
    engine.add(sequence_of(9, [1, 2]))
    run_until_idle(engine)
    assert len(reports) == 5
    assert engine.load().blocks_free == engine.load().blocks_total


@pytest.mark.parametrize("number", [1, 3])
def test_an_engine_that_is_broken_dies(number):
    """Else it would fail request after request behind a good health."""
    engine, runner, _ = engine_of()
    runner.broken = True
    for at in range(number):
        engine.add(sequence_of(at, [at] * 5))
    with pytest.raises(RuntimeError, match="the model fails"):
        run_until_idle(engine)


def test_ids_that_the_model_does_not_have():
    engine, _, _ = engine_of()
    engine.check_ids(range(VOCAB))
    for ids in ([VOCAB], [0, -1], [2**31, 0]):
        with pytest.raises(Exception, match="outside the model's vocabulary"):
            engine.check_ids(ids)


def test_decodes_do_not_starve_prompts():
    """More decodes than the budget has tokens: a prompt still gets on."""
    engine, runner, _ = engine_of(blocks=80, budget=2, running=8)
    for number in range(6):
        engine.add(sequence_of(number, [number], max_tokens=60))
    for _ in range(20):
        with engine._lock:
            step = engine._begin_step()
        engine._run(step)
    assert all(s.phase is not Phase.WAITING for s in engine._scheduler.running)
    assert runner.largest <= 6
