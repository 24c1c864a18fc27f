"""How a member ends when its raylet does. Ray is not needed for it."""

from __future__ import annotations

import asyncio
import os

import pytest

from tercet.cluster import actors


class Ended(Exception):
    pass


@pytest.fixture
def orphan(monkeypatch) -> None:
    parents = iter([7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    monkeypatch.setattr(actors, "LOOK_EVERY_S", 0.0)

    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "_exit", end)


async def test_a_last_word_comes_before_the_end(orphan):
    said = []

    async def last_word() -> None:
        said.append("stopping")

    with pytest.raises(Ended):
        await actors.end_with_raylet(last_word)
    assert said == ["stopping"]


async def test_a_last_word_that_hangs_is_no_reason_to_stay(orphan, monkeypatch):
    ended = asyncio.Event()
    monkeypatch.setattr(actors, "LAST_WORD_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watch = asyncio.create_task(actors.end_with_raylet(asyncio.Event().wait))
    await ended.wait()
    watch.cancel()
