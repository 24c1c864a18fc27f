"""A cluster with all its doors shut, on a Ray of its own: what listens where, and who gets in."""

from __future__ import annotations

import ipaddress
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.field.listening import listeners
from tests.machine import Machine, Served, free_port, new_machine, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


@pytest.fixture(scope="module")
def shut(machine: Machine) -> Iterator[tuple[Served, str]]:
    """-> the cluster, and an API key of it."""
    authority, spec, name = Authority(machine.folder / "tls"), *machine.tiny_spec("shut")
    keys = machine.folder / "keys.yaml"
    key = machine.run("tercet", "keys", "add", str(keys), "team-a").stdout.strip()
    gateway, peer = authority.gateway(), authority.peer()
    wanted = {
        "gateway.api_keys": str(keys),
        "gateway.tls": gateway.model_dump_json(),
        "network.tls": peer.model_dump_json(),
        "transfer.transport": "tcp",
    }
    settings = [part for path, value in wanted.items() for part in ("--set", f"{path}={value}")]
    process = machine.start("tercet", "serve", str(spec), *settings)
    served = Served(machine, process, "shut", name)
    until(lambda: process.poll() is not None or "ready: https://" in served.log, 120)
    assert process.poll() is None, served.log
    yield served, key
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, served.log
    until(lambda: not machine.left(), 20)


def chat(machine: Machine, served: Served, key: str, ca: Path | None) -> subprocess.CompletedProcess[str]:
    machine.variables["TERCET_API_KEY"] = key
    trusts = ("--ca", str(ca)) if ca else ()
    return machine.run(
        "tercet", "chat", "hello", "--url", f"https://127.0.0.1:{served.http}", "--max-tokens", "4", *trusts
    )


def is_loopback(host: str) -> bool:
    found = ipaddress.ip_address(host)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_nothing_listens_but_on_loopback(machine, shut):
    """Of Ray's processes as of ours: GCS, raylet, agents, dashboard, workers, gateway."""
    found = {(host, port, told) for pid, told in machine.left().items() for host, port in listeners(pid)}
    assert len(found) >= 8
    assert [each for each in found if not is_loopback(each[0])] == []
    if shutil.which("ss"):
        told = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
        ports = {str(port) for _, port, _ in found}
        ours = [line.split()[3] for line in told if line.split()[3].rsplit(":", 1)[1] in ports]
        assert len(ours) >= len(ports)
        assert all(address.startswith(("127.", "[::1]", "[::ffff:127.")) for address in ours), ours


def test_who_has_the_key_and_trusts_the_certificate_gets_an_answer(machine, shut):
    served, key = shut
    ca = machine.folder / "tls" / "ca.pem"
    assert chat(machine, served, key, ca).returncode == 0
    for wrong, trusts, says in ((key, None, "certificate verify failed"), ("tercet-x", ca, "unauthenticated")):
        done = chat(machine, served, wrong, trusts)
        assert done.returncode == 1
        assert says in done.stdout + done.stderr
    machine.variables |= {"TERCET_API_KEY": key, "TERCET_CA": str(ca)}
    for told in (("top", "--json"), ("explain", "--json")):
        done = machine.run("tercet", *told, "--url", f"https://127.0.0.1:{served.http}")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
    state = json.loads(machine.run("tercet", "status", "--name", "shut", "--json").stdout)
    pairs = [pair for worker in state["workers"].values() for pair in worker["load"]["pairs"]]
    assert {pair["transport"] for pair in pairs} == {"tcp"}
    assert not any(pair["fault"] for pair in pairs)


def test_a_key_that_is_taken_out_is_refused_soon_and_a_new_one_let_in(machine, shut):
    served, _ = shut
    keys, ca = str(machine.folder / "keys.yaml"), machine.folder / "tls" / "ca.pem"
    new = machine.run("tercet", "keys", "add", keys, "team-b").stdout.strip()
    until(lambda: chat(machine, served, new, ca).returncode == 0, 30)
    assert machine.run("tercet", "keys", "remove", keys, "team-b").returncode == 0
    until(lambda: "unauthenticated" in chat(machine, served, new, ca).stdout, 30)


def test_its_members_are_watched_and_come_back(machine, shut):
    """The controller asks ports that speak TLS, and a new worker's are found by its certificate."""
    served, key = shut
    before = served.status()["workers"]["worker-1"]
    subprocess.run(["kill", "-9", str(before["pid"])], check=True)
    until(lambda: served.status()["workers"].get("worker-1", before)["epoch"] > before["epoch"], 60)
    ca = machine.folder / "tls" / "ca.pem"
    until(lambda: chat(machine, served, key, ca).returncode == 0, 60)
    assert " port at " not in served.log  # of one that would not answer


def test_files_that_are_wrong_are_one_line(machine):
    spec, _ = machine.tiny_spec("wrong")
    for setting, says in (
        ("gateway.api_keys=/none.yaml", "/none.yaml: cannot be read"),
        ("gateway.tls={certificate: /none.pem, key: /none.key}", "gateway.tls: /none.pem and /none.key are no cert"),
        ("network.tls={certificate: /a.pem, key: /a.key, ca: /ca.pem}", "network.tls: /ca.pem cannot be read"),
    ):
        done = machine.run("tercet", "serve", str(spec), "--set", setting, "--set", f"gateway.http.port={free_port()}")
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr
