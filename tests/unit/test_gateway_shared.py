"""One rendering for all who ask at once and for a moment after."""

import asyncio
import threading

import pytest

from tercet.roles.gateway import shared
from tercet.roles.gateway.offloop import OffLoop
from tercet.roles.gateway.shared import Shared


class Work:
    """Renders its own number, when it may."""

    def __init__(self):
        self.taken, self.at_once, self.most, self.go = 0, 0, 0, threading.Event()

    def take(self):
        self.taken += 1
        return lambda number=self.taken: self.render(number)

    def render(self, number):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.go.wait(20)
        self.at_once -= 1
        return number


@pytest.fixture
async def offloop():
    offloop = OffLoop()
    yield offloop
    offloop.close()


async def asking(one, count):
    tasks = [asyncio.create_task(one.get()) for _ in range(count)]
    await asyncio.sleep(0.01)
    return tasks


async def test_who_asks_at_once_and_soon_after_gets_the_same(offloop):
    work = Work()
    one = Shared(offloop, work.take)
    tasks = await asking(one, 5)
    work.go.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert await one.get() == 1


async def test_a_rendering_is_good_for_a_moment_only(offloop, monkeypatch):
    monkeypatch.setattr(shared, "FRESH_S", 0.0)
    work = Work()
    work.go.set()
    one = Shared(offloop, work.take)
    assert [await one.get(), await one.get()] == [1, 2]


async def test_who_leaves_takes_it_from_nobody(offloop):
    work = Work()
    one = Shared(offloop, work.take)
    first, *others = await asking(one, 3)
    first.cancel()
    await asyncio.wait([first])
    work.go.set()
    assert await asyncio.gather(*others) == [1, 1]


async def test_two_kinds_are_never_rendered_at_once(offloop):
    work = Work()
    tasks = await asking(Shared(offloop, work.take), 2) + await asking(Shared(offloop, work.take), 2)
    work.go.set()
    assert await asyncio.gather(*tasks) == [1, 1, 2, 2]
    assert work.most == 1


async def test_a_failure_is_not_kept(offloop):
    broken = [True]

    def take():
        if broken.pop():
            raise ValueError("no")
        return lambda: "well"

    one = Shared(offloop, take)
    with pytest.raises(ValueError, match="no"):
        await one.get()
    broken.append(False)
    assert await one.get() == "well"
