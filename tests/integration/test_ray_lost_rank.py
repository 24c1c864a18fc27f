"""`tercet serve` on a real Ray: a rank of a decode worker whose experts have replicas is killed while clients ask. None
of them fails or gets another answer, and the cluster says what it lacks until the rank is back, in the same epoch."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from examples.make_tiny_model import Family, make
from tests.machine import Machine, Served, new_machine, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]
CLIENTS, TOKENS = 3, 24


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


class Clients:
    """Each asks, one question after the other, and notes what was wrong."""

    def __init__(self, served: Served) -> None:
        self._served, self._over = served, threading.Event()
        self._expected = [self.answer(number) for number in range(CLIENTS)]
        self.answered, self.wrong = [0] * CLIENTS, list[str]()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def answer(self, number: int) -> str:
        prompt = "one two three four five six " * (number + 1)
        return self._served.client().chat(prompt, temperature=0, max_tokens=TOKENS).text

    def _run(self, number: int) -> None:
        while not self._over.is_set():
            try:
                told = self.answer(number)
            except Exception as error:  # whatever it is, the test says it
                told = repr(error)
            if told != self._expected[number]:
                self.wrong.append(told)
            self.answered[number] += 1

    def until_all_are_answered(self) -> None:
        before = [*self.answered]
        until(lambda: all(now > then + 1 for now, then in zip(self.answered, before, strict=True)), 60)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def health(served: Served) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http}/health") as answer:
        return json.load(answer)


def test_a_killed_rank_costs_no_request_and_comes_back(machine):
    source = machine.folder / "tiny"
    make(Family("deepseek-v3"), source)
    ranks = "roles.decode.parallelism={data: 2, expert: 2, expert_redundancy: 8}"
    shape = ("roles.decode.replicas=1", "roles.decode.cpus=0.25", "roles.prefill.cpus=0.5", ranks)
    shape += ("ray.health_deadline_s=3",)  # the rank needs longer to come back: its worker is none the less well
    served = serve(
        machine, "experts", f"model.source={source}", "model.dtype=float32", "model.max_context=1024", *shape
    )

    worker_id = next(w for w, m in served.status()["members"].items() if m["role"] == "decode")

    def decode() -> dict[str, Any]:
        return served.status()["members"][worker_id]

    before = decode()
    clients = Clients(served)
    try:
        clients.until_all_are_answered()
        os.kill(before["ranks"][0]["pid"], signal.SIGKILL)
        degraded = {"status": "degraded", "reason": f"{worker_id} goes on without 1 of its ranks"}
        until(lambda: health(served) == degraded, 20)
        clients.until_all_are_answered()
        until(lambda: decode()["ranks"][0]["pid"] not in {0, before["ranks"][0]["pid"]}, 90)
        clients.until_all_are_answered()
    finally:
        clients.end()
    after = decode()
    assert clients.wrong == []
    for told in ("goes on without rank 1", "has its rank 1 back"):
        assert f"decode {worker_id} {told}" in served.log
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http}/metrics") as answer:
        series = [line.rpartition(" ")[0] for line in answer.read().decode().splitlines() if line[0] != "#"]
    assert len(series) == len({*series})  # also of the pairs with each rank
    assert health(served) == {"status": "ok"}
    assert (after["pid"], after["epoch"], after["state"]) == (before["pid"], before["epoch"], "live")
    assert after["ranks"][0]["pid"] != before["ranks"][0]["pid"]
    rows = {each["rank"]: sum(each["rows"]) for each in after["experts"]}
    clients = Clients(served)
    clients.until_all_are_answered()
    clients.end()
    assert clients.wrong == []
    now = {each["rank"]: sum(each["rows"]) for each in decode()["experts"]}
    assert all(now[rank] > rows[rank] for rank in (0, 1))  # the new rank computes
    assert machine.run("tercet", "down", "--name", "experts").returncode == 0
    assert served.process.wait(30) == 0, served.log
    until(lambda: not machine.left(), 20)
