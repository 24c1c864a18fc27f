"""Places: a bound, a share for each client, and room as it comes."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import Overloaded
from tercet.roles.gateway.admission import Admission


def admission(limit):
    return Admission(limit, lambda _: None)


def enter(made, client, times):
    return [made.enter(client) for _ in range(times)]


async def test_one_client_may_hold_every_place_and_no_more():
    made = admission(4)
    held = enter(made, "a", 4)
    with pytest.raises(Overloaded, match="4 requests are in flight, 4 of them this client's"):
        made.enter("a")
    held[0].close()
    made.enter("a")


async def test_a_client_below_its_share_is_let_in_beyond_the_limit():
    made = admission(4)
    enter(made, "a", 4)
    enter(made, "b", 2)  # a share of two holds 4 // 2
    with pytest.raises(Overloaded):
        made.enter("b")
    made.enter("c")  # three hold one each
    with pytest.raises(Overloaded):
        made.enter("c")
    assert made.in_use == 7


async def test_the_choices_of_one_request_take_no_share_of_others():
    """Those of a request that came first may fill what its client's further requests go beyond."""
    made = admission(4)
    many = made.enter("heavy")
    for _ in range(3):
        await many.take()
    enter(made, "heavy", 3)
    for client in ("a", "b", "c", "d"):
        made.enter(client)
    with pytest.raises(Overloaded, match="8 requests are in flight, 0 of them this client's"):
        made.enter("e")


async def test_never_more_than_twice_the_limit():
    made = admission(3)
    enter(made, "a", 3)
    for client in "bcd":
        made.enter(client)
    with pytest.raises(Overloaded):
        made.enter("e")
    assert made.in_use == 6


async def test_the_choices_of_one_request_shut_nobody_out():
    """Not even requests of the same client."""
    made = admission(4)
    many = made.enter("a")
    for _ in range(3):
        await many.take()
    waiting = asyncio.create_task(many.take())
    others = enter(made, "a", 3)
    assert made.in_use == 7
    with pytest.raises(Overloaded):
        made.enter("a")  # its fifth request
    for places in others:
        places.close()
    await asyncio.sleep(0)
    assert not waiting.done()  # as many run as may
    many.give()
    await waiting
    many.close()
    assert made.idle.is_set()


async def test_further_places_come_one_by_one_to_who_holds_the_fewest():
    made = admission(4)
    greedy, modest = made.enter("greedy"), made.enter("modest")
    taken = Counter()

    async def take(places, name):
        await places.take()
        taken[name] += 1

    tasks = [asyncio.create_task(take(greedy, "greedy")) for _ in range(10)]
    tasks += [asyncio.create_task(take(modest, "modest")) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert taken == {"greedy": 2}  # came first, and had no rival yet
    greedy.give()
    await asyncio.sleep(0)
    assert made._held == {"greedy": 2, "modest": 2}
    greedy.give()
    await asyncio.sleep(0)
    assert made._held == {"greedy": 2, "modest": 2}  # it was its turn again
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    greedy.close()
    modest.close()
    assert made.in_use == 0
    assert made.idle.is_set()


async def test_a_place_given_to_who_is_cancelled_goes_on():
    made = admission(1)
    first = made.enter("a")
    waiting = asyncio.create_task(made.wait("a"))
    await asyncio.sleep(0)
    first.give()  # waiting has it, and is cancelled before it runs
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert made.in_use == 0


async def test_a_place_that_comes_free_as_its_waiter_is_cancelled():
    made = admission(1)
    first = made.enter("a")
    waiting = asyncio.create_task(made.wait("a"))
    await asyncio.sleep(0)
    waiting.cancel()
    first.give()  # passes over it before it runs
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert made.in_use == 0


STEPS = "enter", "take", "give", "close", "cancel", "turn", "turn"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(STEPS)), max_size=60))
def test_no_order_leaks_a_place(steps):
    asyncio.run(_run(steps))


async def _run(steps):
    """Several steps may fall into one turn of the event loop."""
    made, open_ = admission(3), {}  # places -> its takes
    for client, step in steps:
        mine = [places for places in open_ if places._client == client]
        if step == "enter":
            try:
                open_[made.enter(client)] = []
            except Overloaded:
                assert made._requests.total() >= 3
        elif step == "take" and mine:
            open_[mine[0]].append(asyncio.create_task(mine[0].take()))
        elif step == "give" and mine and mine[0]._count:
            mine[0].give()
        elif step == "close" and mine:
            await _close(mine[0], open_.pop(mine[0]))
        elif step == "cancel" and mine and open_[mine[0]]:
            open_[mine[0]][-1].cancel()
        elif step == "turn":
            await asyncio.sleep(0)
        assert 0 <= made.in_use <= 9
        assert made._requests.total() <= 6
        assert made.in_use == sum(made._held.values())
    for places, takes in open_.items():
        await _close(places, takes)
    assert made.in_use == 0
    assert not made._waiting
    assert made.idle.is_set()


async def _close(places, takes):
    """As a session does: it ends its tasks first."""
    for task in takes:
        task.cancel()
    for outcome in await asyncio.gather(*takes, return_exceptions=True):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), repr(outcome)
    places.close()
