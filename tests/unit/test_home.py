"""How a controller sees that its Ray is lost."""

from __future__ import annotations

import asyncio

import pytest

from tercet.cluster import home, ray_address
from tercet.cluster.home import Home
from tercet.errors import RayLost
from tercet.wire.knock import Answer

SERVERS = {"the GCS": "127.0.0.1:1", "the node": "127.0.0.1:2"}


@pytest.fixture
def silent(monkeypatch) -> set[str]:
    """Addresses that do not answer."""
    silent: set[str] = set()
    answer = {True: Answer("UNAVAILABLE", details="refused", silent=True), False: Answer("UNIMPLEMENTED")}
    monkeypatch.setattr(ray_address, "ask", lambda address, timeout_s: answer[address in silent])
    monkeypatch.setattr(home, "WATCH_EVERY_S", 0.0)
    return silent


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("name", SERVERS)
async def test_silence_is_told_at_once_and_after_a_while_the_end(silent, name):
    told: list[str] = []
    watching = asyncio.create_task(Home(SERVERS, 0.05, told.append).watch())
    await asyncio.sleep(0.01)
    assert told == []
    silent.add(SERVERS[name])
    await until(lambda: told)
    assert told[0].startswith(
        f"{name} at {SERVERS[name]} does not answer (UNAVAILABLE: refused); unless it does within"
    )
    with pytest.raises(RayLost, match=f"Ray is lost: {name} at {SERVERS[name]} does not answer"):
        await watching
    assert len(told) == 1


async def test_a_server_that_comes_back_in_time_is_no_loss(silent):
    told: list[str] = []
    watching = asyncio.create_task(Home(SERVERS, 60.0, told.append).watch())
    for _ in range(2):
        told.clear()
        silent.update(SERVERS.values())
        await until(lambda: len(told) == 1)
        silent.clear()
        await until(lambda: len(told) == 2)
        assert told[-1] == "Ray answers again"
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_node_that_ends_while_it_is_joined_is_a_loss_of_its_name(silent, monkeypatch):
    monkeypatch.setattr(ray_address, "owners", lambda address: set())
    with pytest.raises(RayLost, match=r"Ray is lost: the node \(raylet\) of the Ray at 127\.0\.0\.1:1 does not run"):
        await Home({}, 0.0, lambda line: None, node_of="127.0.0.1:1").watch()
