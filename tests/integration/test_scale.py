"""A served cluster that grows and shrinks, and whose workers change their roles, under load: no request fails, and
every answer is the one from before."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

from tests.machine import Machine, Served, is_ready, new_machine, until
from tests.tiny import VOCAB

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]

PROMPTS = [[(first + 7 * n) % VOCAB for n in range(30 + 10 * first)] for first in range(6)]
TOKENS = 50


@pytest.fixture
def served() -> Iterator[Served]:
    machine = new_machine()
    path, port = machine.tiny_spec("scaled")
    process = machine.start("tercet", "serve", str(path))
    made = Served(machine, process, "scaled", port)
    until(lambda: process.poll() is not None or is_ready(made.client()), 90)
    yield made
    process.terminate()
    process.wait(40)
    machine.clear()


def answer(port: int, prompt: list[int]) -> tuple[str, dict[str, str]]:
    """Greedy text, and role -> worker."""
    asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        body = json.load(response)
    return body["choices"][0]["text"], body["timings"]["workers"]


class Load:
    """Clients that ask again and again, until they are told to stop."""

    def __init__(self, port: int, clients: int) -> None:
        self.port = port
        self.wanted = [answer(port, prompt)[0] for prompt in PROMPTS]
        self.answers = 0
        self.faults: list[str] = []
        self.used: set[str] = set()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            number = (number + 1) % len(PROMPTS)
            try:
                text, workers = answer(self.port, PROMPTS[number])
            except OSError as error:
                self.faults.append(repr(error))
                continue
            self.answers += 1
            time.sleep(0.05)  # leaves the machine a moment for what starts
            self.used |= set(workers.values())
            if text != self.wanted[number]:
                self.faults.append(f"another answer to prompt {number}: {text!r}")


def scale(machine: Machine, role: str, replicas: int) -> str:
    done = machine.run("tercet", "scale", role, str(replicas))
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_it_grows_and_shrinks_under_load_and_no_request_fails(served):
    machine = served.machine
    with Load(served.http, clients=4) as load:
        assert "decode has 2 workers (worker-2 came)" in scale(machine, "decode", 2)
        assert "prefill has 2 workers (worker-3 came)" in scale(machine, "prefill", 2)
        until(lambda: load.used == {"worker-0", "worker-1", "worker-2", "worker-3"})
        assert "decode has 1 worker (worker-2 went)" in scale(machine, "decode", 1)
        assert "prefill has 1 worker (worker-3 went)" in scale(machine, "prefill", 1)
        load.used.clear()
        before = load.answers
        until(lambda: load.answers > before + 6)
    assert load.faults == []
    assert load.used == {"worker-0", "worker-1"}
    status = served.status()
    assert status["target"] == {"prefill": 1, "decode": 1}
    assert {name: member["state"] for name, member in status["members"].items()} == {
        "worker-0": "live", "worker-1": "live"
    }  # fmt: skip
    assert "lost" not in served.log
    told = scraped(served)
    for role in ("prefill", "decode"):
        assert f'tercet_workers_wanted{{role="{role}"}} 1.0' in told
        assert f'tercet_workers{{role="{role}",state="live"}} 1.0' in told


def scraped(served: Served) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http}/metrics", timeout=10) as response:
        return response.read().decode()


def set_role(machine: Machine, worker: str, role: str) -> str:
    done = machine.run("tercet", "role", "set", worker, role)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def members_of(served: Served) -> dict[str, tuple[str, int]]:
    """Worker -> role, epoch."""
    return {name: (member["role"], member["epoch"]) for name, member in served.status()["members"].items()}


@pytest.mark.slow  # test_role_switch does so without Ray, and test_commands once with it
def test_workers_change_their_roles_under_load_and_no_request_fails(served):
    machine = served.machine
    refused = machine.run("tercet", "role", "set", "worker-0", "decode")
    assert refused.returncode == 2
    assert "prefill cannot have 0 workers" in refused.stderr
    with Load(served.http, clients=4) as load:
        scale(machine, "decode", 2)
        pid = served.status()["members"]["worker-2"]["pid"]
        said = set_role(machine, "worker-2", "prefill")
        assert re.search(r"worker-2 serves as prefill, in its process, after [\d.]+ s, [\d.]+ s of them to drain", said)
        assert "worker-0 serves as decode, in its process" in set_role(machine, "worker-0", "decode")
        load.used.clear()
        until(lambda: load.used == {"worker-0", "worker-1", "worker-2"})
        assert members_of(served) == {"worker-0": ("decode", 2), "worker-1": ("decode", 1), "worker-2": ("prefill", 2)}
        assert served.status()["members"]["worker-2"]["pid"] == pid
        pid = served.status()["members"]["worker-0"]["pid"]
        os.kill(pid, signal.SIGSTOP)  # it will not drain
        asked = machine.start("tercet", "role", "set", "worker-0", "prefill")
        until(lambda: "decode worker-0 (epoch 2) drains" in served.log)
        os.kill(pid, signal.SIGKILL)
        assert asked.wait(60) == 0
        assert "worker-0 serves as prefill, in a new process" in asked.log.read_text()
        load.used.clear()
        until(lambda: load.used == {"worker-0", "worker-1", "worker-2"})
    assert load.faults == []
    told = scraped(served)
    assert 'tercet_role_switches_total{how="in_place"} 2.0' in told
    assert "tercet_role_switch_seconds_count 3.0" in told
    assert 'tercet_worker_info{role="prefill",worker="worker-0"} 1.0' in told
