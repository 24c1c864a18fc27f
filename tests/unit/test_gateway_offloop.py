"""Long work: one piece at a time, clients in turn, and short work never behind it."""

import asyncio
import gc
import threading
import weakref

import pytest

from tercet.roles.gateway.offloop import INLINE, LONG, Lane, OffLoop


@pytest.fixture
async def lane():
    lane = Lane("test")
    yield lane
    lane.close()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def test_clients_take_turns(lane):
    go, order = threading.Event(), []
    first = asyncio.create_task(lane.run("heavy", go.wait))
    await asyncio.sleep(0)
    work = [("heavy", i) for i in range(5)] + [("light", i) for i in range(2)]
    tasks = [asyncio.create_task(lane.run(client, lambda c=client, i=i: order.append((c, i)))) for client, i in work]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(first, *tasks)
    assert order == [*[(c, i) for i in range(2) for c in ("heavy", "light")], *[("heavy", i) for i in range(2, 5)]]


async def test_work_that_is_left_behind_still_holds_the_lane(lane):
    go, ran = threading.Event(), []
    left = asyncio.create_task(lane.run("a", lambda: (go.wait(), ran.append("left"))))
    await asyncio.sleep(0.01)
    next_ = asyncio.create_task(lane.run("b", lambda: ran.append("next")))
    gone = asyncio.create_task(lane.run("c", lambda: ran.append("gone")))
    await asyncio.sleep(0.01)
    left.cancel()
    gone.cancel()
    await asyncio.gather(left, gone, return_exceptions=True)
    assert ran == []
    go.set()
    await next_
    assert ran == ["left", "next"]


async def test_a_failure_is_the_callers_and_leaves_nothing_behind(lane):
    class Large:
        pass

    def work():
        held = Large()
        seen.append(weakref.ref(held))
        raise ValueError("no")

    seen = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            await lane.run("a", work)
        await asyncio.sleep(0)
        await until(lambda: seen[0]() is None)  # by reference counts alone
    finally:
        gc.enable()
    assert await lane.run("a", lambda: 5) == 5


async def test_short_work_passes_long_work():
    offloop, go = OffLoop(), threading.Event()
    long = asyncio.create_task(offloop.run("a", LONG + 1, go.wait))
    await asyncio.sleep(0.01)
    assert await offloop.run("a", INLINE, threading.get_ident) == threading.get_ident()
    assert await offloop.run("a", INLINE + 1, threading.get_ident) != threading.get_ident()
    assert await offloop.run("a", LONG, lambda: "brief") == "brief"
    assert not long.done()
    go.set()
    await long
    offloop.close()
