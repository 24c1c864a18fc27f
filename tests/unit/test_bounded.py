"""Calls into code that may not return."""

from __future__ import annotations

import asyncio
import threading
from typing import NoReturn

import pytest

from tercet.cluster import bounded
from tercet.errors import ClusterError


@pytest.fixture(autouse=True)
def _nothing_left_behind_yet(monkeypatch):
    monkeypatch.setattr(bounded, "_left_behind", threading.Event())


@pytest.fixture
def stuck():
    """A function that returns when the test is over."""
    over = threading.Event()
    yield over.wait
    over.set()


def fails() -> NoReturn:
    raise TimeoutError("its own")


async def test_a_result_and_an_error_come_through():
    assert bounded.call("adding", 5, int.__add__, 1, 2) == await bounded.wait("adding", 5, int.__add__, 1, 2) == 3
    with pytest.raises(TimeoutError, match="its own"):
        bounded.call("failing", 5, fails)
    with pytest.raises(TimeoutError, match="its own"):
        await bounded.wait("failing", 5, fails)
    assert not bounded.left_behind()


def test_a_call_that_does_not_return_is_left_behind(stuck):
    with pytest.raises(ClusterError, match=r"waiting did not end in 0\.01 s"):
        bounded.call("waiting", 0.01, stuck)
    assert bounded.left_behind()


async def test_so_is_one_that_an_event_loop_waits_for(stuck):
    with pytest.raises(ClusterError, match=r"waiting did not end in 0\.01 s"):
        await bounded.wait("waiting", 0.01, stuck)
    assert bounded.left_behind()


async def test_and_one_whose_waiter_is_cancelled(stuck):
    waiting = asyncio.create_task(bounded.wait("waiting", 60, stuck))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert bounded.left_behind()


async def test_whoever_tears_something_down_waits_for_those_inside():
    assert await bounded.settled(0.0)
    inside, over = threading.Event(), threading.Event()

    def call() -> None:
        inside.set()
        over.wait(30)

    task = asyncio.create_task(bounded.wait("a call", 30, call))
    while not inside.is_set():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await bounded.settled(0.1)
    over.set()
    assert await bounded.settled(10)
