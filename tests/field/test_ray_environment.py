"""A cluster on a Ray of its own: what it shows to others, a proxy in its environment, and what is left when it dies."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tercet.client import Client, Result
from tercet.cluster import keeper
from tests.field.test_worker_links import PROXIES
from tests.machine import SMALL, Machine, Served, begin, new_machine, serve, until

TOKENS = 600  # of an answer that is still being made when Ray is lost, however late that is noticed
pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One cluster for all that leave it alive, in an environment full of proxies that nobody answers at."""
    machine = new_machine(**dict.fromkeys(PROXIES, "http://127.0.0.1:1"))
    try:
        yield serve(machine, "lone", *SMALL, "ray.lost_after_s=1", "limits.drain_timeout_s=60")
    finally:
        machine.clear()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


def test_a_proxy_does_not_stand_in_the_way(served):
    assert served.status()["ready"] is True
    assert "Paris" in served.ask()
    said = served.machine.run("tercet", "chat", "--name", "lone", text="What is the capital of France?\n\n")
    assert "Paris" in said.stdout


def test_nothing_listens_on_an_address_that_others_reach(served):
    pids = list(served.machine.left())
    found = {pid: listeners(pid) for pid in pids}
    assert sum(map(len, found.values())) > 8
    assert {pid: ips for pid, ips in found.items() if not all(ip.is_loopback for ip in ips)} == {}


def listeners(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    sockets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    listening = "0A"
    return [address_of(row[1]) for row in rows if row[3] == listening and f"socket:[{row[9]}]" in sockets]


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """From /proc/net/tcp: words of 32 bits, each in the machine's own order."""
    raw = bytes.fromhex(text.partition(":")[0])
    words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    address = ipaddress.ip_address(socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, words))
    return getattr(address, "ipv4_mapped", None) or address


def test_no_other_user_can_come_near_its_files(served):
    run, ray = served.machine.folder / f"tercet-{os.getuid()}", Path(served.note()["ray_folder"])
    assert {mode(run), mode(ray)} == {0o700}
    assert {mode(run / "lone.json"), mode(ray / "token")} == {0o600}
    until(lambda: {mode(path) for path in ray.rglob("*") if path.is_dir()} == {0o700}, 5)
    assert not [path for path in ray.rglob("*") if path.is_file() and mode(path) & 0o022]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_without_its_control_store_it_says_so_finishes_and_ends(served):
    """The last to use the cluster."""
    result: list[Result | None] = []
    streaming = threading.Thread(target=lambda: result.append(story(served.client(), TOKENS)))
    streaming.start()
    until(lambda: served.status()["inflight"] == 1)
    os.kill(process_of(served, "gcs_server"), signal.SIGKILL)
    until(lambda: "Ray's control store (GCS) at 127.0.0.1:" in served.log, 5)
    reason = until(lambda: health(served), 15)
    assert "Ray's control store (GCS) at 127.0.0.1:" in reason
    streaming.join(60)
    assert result[0].usage["completion_tokens"] == TOKENS
    assert served.process.wait(20) == 1
    assert served.log.splitlines()[-1].startswith("tercet: Ray is lost: Ray's control store (GCS) at")
    nothing_is_left(served)


def story(client: Client, tokens: int) -> Result | None:
    with client.stream("Tell me a long story.", max_tokens=tokens, temperature=0, ignore_eos=True) as answer:
        for _ in answer:
            pass
    return answer.result


def process_of(served: Served, name: str) -> int:
    return next(pid for pid, command in served.machine.left().items() if name in command.partition(" ")[0])


def health(served: Served) -> str:
    """Why it is not healthy."""
    connection, response = served.client()._open("GET", "/health")
    try:
        return response.read().decode() if response.status == 503 else ""
    finally:
        connection.close()


def nothing_is_left(served: Served) -> None:
    until(lambda: not served.machine.left(), 10)
    assert not list(served.machine.folder.glob("tercet-*/*"))


def test_a_killed_controller_leaves_nothing(machine):
    served = begin(machine, "killed", *SMALL)
    until(lambda: "is up (epoch 1)" in served.log)
    served.process.kill()
    until(lambda: not machine.left(), 5)
    assert list(machine.folder.glob("tercet-*/*")) == [machine.folder / f"tercet-{os.getuid()}" / "killed.json"]


def test_what_a_controller_and_its_keeper_left_is_ended_by_the_next_one(machine):
    served = begin(machine, "twice", *SMALL)
    until(lambda: "started Ray" in served.log)
    note = served.note()
    os.kill(note["ray_session"], signal.SIGKILL)
    served.process.kill()
    served.process.wait()
    assert any("gcs_server" in command for command in machine.left().values())
    again = begin(machine, "twice", *SMALL)
    until(lambda: again.note()["ray_folder"] not in {"", note["ray_folder"]})
    assert not Path(note["ray_folder"]).exists()
    assert not [pid for pid in machine.left() if keeper._session(pid) == note["ray_session"]]
    os.killpg(again.process.pid, signal.SIGTERM)  # while Ray starts
    assert again.process.wait(10) == 130
    nothing_is_left(again)


def test_others_are_not_ended_with_an_abandoned_session(machine):
    """The number of a keeper that is long gone may be another's session by now."""
    other = machine.start("sleep", "60")
    folder = machine.folder / "gone"
    folder.mkdir()
    keeper.clear_abandoned(folder, other.pid)
    assert other.poll() is None
    assert not folder.exists()
