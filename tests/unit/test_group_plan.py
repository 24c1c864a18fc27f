"""A step as micro-batches for the stages of a pipeline, and the results that come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import Ticket, TokenEvent
from tercet.distributed.place import Place
from tercet.engine.group import GroupExecutor
from tercet.engine.plan import Piece, PieceResult, StepPlan, pack, pack_result, unpack_result
from tercet.engine.rank_steps import RankSteps
from tercet.errors import EngineFault, InternalError, WorkerDrained, WorkerLost


def piece(number: int, length: int) -> Piece:
    return Piece(Ticket(f"r{number}", 0, 1), tuple(range(length)), number, (number,))


PLANS = st.builds(
    lambda decodes, chunks, landed: StepPlan(
        tuple(piece(n, 1) for n in range(decodes)),
        tuple(piece(100 + n, length) for n, length in enumerate(chunks)),
        tuple(landed),
    ),
    st.integers(0, 9),
    st.lists(st.integers(1, 300), max_size=9),
    st.lists(st.integers(0, 99), max_size=5),
)


@given(PLANS.filter(lambda plan: plan.pieces), st.integers(1, 6))
def test_each_piece_is_in_one_micro_batch_under_its_number(plan, most):
    parts = plan.divided(most)
    assert Counter(number for _, numbers in parts for number in numbers) == dict.fromkeys(range(len(plan.pieces)), 1)
    for part, numbers in parts:
        assert list(part.pieces) == [plan.pieces[number] for number in numbers]
        assert set(part.decodes) <= set(plan.decodes)
        assert set(part.chunks) <= set(plan.chunks)


@given(PLANS.filter(lambda plan: plan.pieces), st.integers(1, 6))
def test_no_micro_batch_is_empty_and_there_are_as_many_as_can_be(plan, most):
    parts = plan.divided(most)
    assert len(parts) == min(most, len(plan.pieces))
    assert all(part.pieces for part, _ in parts)


@given(PLANS.filter(lambda plan: plan.pieces), st.integers(1, 6))
def test_blocks_land_once_and_first(plan, most):
    """Every micro-batch may read them, and they are computed in this order."""
    assert [part.landed for part, _ in plan.divided(most)] == [
        plan.landed if at == 0 else () for at in range(min(most, len(plan.pieces)))
    ]


@given(PLANS.filter(lambda plan: plan.pieces), st.integers(1, 6))
def test_they_are_about_equally_long(plan, most):
    """No two differ by more than the longest piece."""
    rows = [sum(len(p.token_ids) for p in part.pieces) for part, _ in plan.divided(most)]
    assert max(rows) - min(rows) <= max(len(p.token_ids) for p in plan.pieces)


FLOATS = st.floats(allow_nan=False)
SCORES = st.lists(st.tuples(FLOATS, st.lists(st.tuples(st.integers(0, 2**31), FLOATS), max_size=3).map(tuple)))
RESULTS = st.builds(
    PieceResult,
    st.lists(
        st.builds(
            TokenEvent,
            st.integers(0, 2**31),
            st.none() | FLOATS,
            st.lists(st.tuples(st.integers(0, 2**31), FLOATS), max_size=3).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    SCORES.map(tuple),
    st.none() | st.text(max_size=20).map(EngineFault),
)


@given(st.lists(RESULTS, max_size=5))
def test_results_come_back_as_they_were(results):
    found = unpack_result(pack_result(results))
    assert [(r.tokens, r.scores) for r in found] == [(r.tokens, r.scores) for r in results]
    for ours, theirs in zip(found, results, strict=True):
        assert type(ours.fault) is type(theirs.fault)
        assert str(ours.fault) == str(theirs.fault)


# ---- the executor of rank 0, and that of another


class FakeTalk:
    def __init__(self, rank: int = 0) -> None:
        self.rank, self.told = rank, list[tuple[object, ...]]()
        self.meanwhile: Callable[[tuple[object, ...]], None] = lambda _: None

    def tell(self, *message: object) -> None:
        self.told.append(message)
        self.meanwhile(message)


class FakeRunner:
    """Its result for a piece is the piece's start as a token; fails at the step that the test says."""

    vocab_size, layers_done = 10, 0

    def __init__(self, fails_at: int = 0) -> None:
        self._fails_at, self._launched = fails_at, 0

    def launch(self, plan: StepPlan) -> FakeRunner:
        self._launched += 1
        if self._launched == self._fails_at:
            raise ArithmeticError("no such number")
        self._found = [PieceResult((TokenEvent(p.start),)) for p in plan.pieces]
        return self

    def result(self) -> list[PieceResult]:
        return self._found


def tokens(results: list[PieceResult]) -> list[int]:
    return [result.tokens[0].token_id for result in results]


PLAN = StepPlan((piece(1, 1), piece(2, 1)), (piece(3, 40), piece(4, 2), piece(5, 300)))


@pytest.mark.parametrize("place", [Place(0, 2, 1), Place(0, 1, 1)])
def test_rank_0_draws_itself_if_it_has_the_last_layer(place):
    talks = [FakeTalk(rank) for rank in range(1, place.ranks)]
    executor = GroupExecutor(FakeRunner(), place, talks)
    assert [tokens(executor.launch(PLAN).result()) for _ in range(2)] == [[1, 2, 3, 4, 5]] * 2
    for talk in talks:
        assert [message[:2] for message in talk.told] == [("step", 1), ("step", 2)]


def answering(executor, steps, talk):
    """What another rank does with a step: run it at once, and send the result."""

    def answer(message):
        steps.take(*message[1:])
        steps.stop()
        steps.run()
        executor.take(steps._place.rank, *talk.told.pop()[1:])

    return answer


def test_results_of_another_rank_come_in_the_order_of_the_plan():
    talk, steps_talk, other = FakeTalk(2), FakeTalk(), FakeTalk(1)
    executor = GroupExecutor(FakeRunner(), Place(0, 1, 3), [other, talk])
    steps = RankSteps(FakeRunner(), Place(2, 1, 3), steps_talk)

    talk.meanwhile = answering(executor, steps, steps_talk)
    assert tokens(executor.launch(PLAN).result()) == [1, 2, 3, 4, 5]
    assert [len(message[3]) for message in other.told] == [3]  # micro-batches


def test_replicas_compute_together_and_each_gets_its_own_results():
    talk, steps_talk = FakeTalk(1), FakeTalk()
    executor = GroupExecutor(FakeRunner(), Place(0, 1, 1, 2, 2), [talk])
    steps = RankSteps(FakeRunner(), Place(1, 1, 1, 2, 2), steps_talk)

    talk.meanwhile = answering(executor, steps, steps_talk)
    both = PLAN._replace(others=(StepPlan((piece(7, 1),)),))
    assert tokens(executor.launch(both).result()) == [1, 2, 3, 4, 5, 7]
    assert tokens(executor.launch(PLAN).result()) == [1, 2, 3, 4, 5]  # the other takes part with an empty plan
    assert tokens(executor.launch(StepPlan(others=(PLAN,))).result()) == [1, 2, 3, 4, 5]


def test_results_of_another_step_are_refused_with_both_numbers():
    talk = FakeTalk(1)
    executor = GroupExecutor(FakeRunner(), Place(0, 1, 2), [talk])
    talk.meanwhile = lambda _: executor.take(1, 2, 0, [])
    with pytest.raises(InternalError, match="rank 0 is at step 1, and a rank that draws sent step 2"):
        executor.launch(PLAN)


class FakeSpread:
    """Remembers who is in and out."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def __getattr__(self, verb: str) -> Callable[..., None]:
        return lambda *fields: self.told.append((verb, *fields))


def test_a_step_that_a_loss_breaks_off_is_computed_once_more_without_the_lost_rank():
    left, lost, spread = FakeTalk(1), FakeTalk(2), FakeSpread()
    executor = GroupExecutor(FakeRunner(), Place(0, 1, 1, 3, 3), [left, lost], spread)
    results = pack_result([PieceResult((TokenEvent(7),))])

    def answer(message):
        _, number, attempt, _ = message
        if attempt == 0:
            executor.take(1, number, 0, [results])  # this one had ended it, and rank 2 had not
            executor.lose(2, 1)
        else:
            executor.take(1, number, 1, [results])

    left.meanwhile = answer
    plan = PLAN._replace(others=(StepPlan((piece(7, 1),)), StepPlan((piece(8, 1),))))
    found = executor.launch(plan).result()
    assert tokens(found[:6]) == [1, 2, 3, 4, 5, 7]
    assert isinstance(found[6].fault, WorkerDrained)
    assert [message[1:3] for message in left.told] == [(1, 0), (1, 1)]
    assert len(lost.told) == 1
    assert spread.told == [("cut", 2), ("without", 2, 1)]
    executor.rejoin(lost, lambda drain: (drain(), ("there", 2))[1])
    assert spread.told[2:] == [("rejoin", 2, "there", 2)]
    lost.meanwhile = lambda message: executor.take(2, message[1], message[2], [results])
    left.meanwhile = lambda message: executor.take(1, message[1], message[2], [results])
    assert tokens(executor.launch(plan).result()) == [1, 2, 3, 4, 5, 7, 7]
    assert left.told[-1][1:3] == (2, 2)


def test_a_rank_drops_a_step_of_before_a_loss():
    talk, spread, runner = FakeTalk(), FakeSpread(), FakeRunner()
    steps = RankSteps(runner, Place(1, 1, 1, 3, 3), talk, spread)
    steps.without(2, 1)
    steps.take(1, 0, [pack(PLAN)])
    steps.take(1, 1, [pack(PLAN)])
    steps.stop()
    steps.run()
    assert [message[:3] for message in talk.told] == [("drawn", 1, 1)]
    assert runner._launched == 1


def test_a_broken_group_launches_nothing_and_waits_for_nothing():
    talk = FakeTalk(1)
    executor = GroupExecutor(FakeRunner(), Place(0, 1, 2), [talk])
    talk.meanwhile = lambda _: executor.fail(WorkerLost("rank 1 died"))
    for _ in range(2):
        with pytest.raises(WorkerLost, match="rank 1 died"):
            executor.launch(PLAN)
    assert len(talk.told) == 1


@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_a_step_out_of_order_is_told_with_both_numbers_and_not_run(wrong):
    talk = FakeTalk()
    steps = RankSteps(FakeRunner(), Place(1, 2), talk)
    steps.take(1, 0, [pack(PLAN)])
    steps.take(wrong, 0, [pack(PLAN)])
    steps.stop()
    steps.run()
    assert talk.told == [("failed", f"rank 1 is behind step 1, and rank 0 sent step {wrong}")]


def test_a_step_that_raises_is_told_and_ends_the_thread():
    talk = FakeTalk()
    steps = RankSteps(FakeRunner(fails_at=2), Place(1, 2), talk)
    for number in (1, 2, 3):
        steps.take(number, 0, [pack(PLAN)])
    steps.run()  # returns without `stop`
    assert talk.told == [("failed", "step 2 failed on rank 1: ArithmeticError: no such number")]
