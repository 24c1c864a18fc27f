"""Two hosts on one machine: network namespaces with nothing but a cable between them. Ray takes a token, a job serves,
pools bind workers to hosts, and KV crosses the cable by TCP with TLS.

    tc-a 10.77.0.1  head, gateway, prefill  <── veth ──>  tc-b 10.77.0.2  decode
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.certificates import Authority
from tests.machine import BIN, ROOT, Machine, new_machine, until
from tests.tiny import tiny_model

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(600)]

A, B = "10.77.0.1", "10.77.0.2"
JOBS = f"http://{A}:8265"
URL = "http://127.0.0.1:8000"  # of the gateway, on its own host
SPEAKS_PLAIN = r"""
import socket, sys
spoken = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
spoken.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
print(spoken.recv(9)[:1])
"""
PROMPT = "one two three four five " * 20


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def cannot() -> str:
    """Why this machine has no namespaces; empty if it has."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return "takes root, and iproute2"
    made = ip("netns", "add", "tc-try")
    ip("netns", "del", "tc-try")
    return made.stderr.strip() and f"no network namespaces here: {made.stderr.strip()}"


@dataclass
class Hosts:
    machine: Machine
    spec: Path
    wheel: Path

    def on(self, host: str, *command: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        return self.machine.run("/usr/sbin/ip", "netns", "exec", host, *command, seconds=seconds)

    def ray(self, *words: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`ray job ...` from the head's host."""
        return self.on("tc-a", "ray", "job", words[0], f"--address={JOBS}", *words[1:], seconds=seconds)

    def submit(self, name: str, *sets: str) -> None:
        settings = [part for each in sets for part in ("--set", each)]
        # As of a machine of its own: the job's folder has the spec, and a wheel is sent with it.
        done = self.ray(
            "submit", f"--working-dir={self.spec.parent}", "--no-wait", f"--submission-id={name}",
            "--runtime-env-json", json.dumps({"py_modules": [str(self.wheel)]}),
            "--", "python", "-m", "tercet", "serve", self.spec.name, *settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def outcome(self, name: str) -> str:
        told = self.ray("status", name)
        found = re.search(r"SUCCEEDED|FAILED|STOPPED", (told.stdout + told.stderr).upper())
        return found[0] if found else ""

    def is_ready(self) -> bool:
        script = f"import sys; from tercet import Client; sys.exit(not Client('{URL}').is_ready())"
        return self.on("tc-a", "python", "-c", script).returncode == 0

    def ask(self) -> list[int]:
        script = (
            f"from tercet import Client; answer = Client('{URL}').generate('{PROMPT}', temperature=0, max_tokens=8, "
            "ignore_eos=True, return_token_ids=True); print(*answer.token_ids); print(answer.timings['transport'])"
        )
        done = self.on("tc-a", "python", "-c", script)
        assert done.returncode == 0, done.stderr
        ids, transport = done.stdout.splitlines()
        assert transport == "tcp"
        return [int(each) for each in ids.split()]


def crossed() -> int:
    """Bytes that have come to the second host."""
    told = ip("netns", "exec", "tc-b", "cat", "/sys/class/net/tc-vb/statistics/rx_bytes")
    return int(told.stdout)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if why := cannot():
        pytest.skip(why)
    machine = new_machine()
    try:
        ip("link", "add", "tc-va", "type", "veth", "peer", "name", "tc-vb")
        for host, link, address in (("tc-a", "tc-va", A), ("tc-b", "tc-vb", B)):
            ip("netns", "add", host)
            ip("link", "set", link, "netns", host)
            ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            for each in (link, "lo"):
                assert ip("-n", host, "link", "set", each, "up").returncode == 0
        yield started(machine)
    finally:
        machine.clear()
        for host in ("tc-a", "tc-b"):
            ip("netns", "del", host)


def started(machine: Machine) -> Hosts:
    token, folder = machine.folder / "token", machine.folder / "job"
    token.write_text("0123456789abcdef" * 4)
    machine.variables |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PIP_NO_DEPS": "1",
        "PATH": f"{BIN}:/usr/sbin:/usr/bin:/bin",
    }
    folder.mkdir()
    built = machine.run("make", "--no-print-directory", "-o", ".venv/.stamp", "wheel")
    assert built.returncode == 0, built.stderr
    hosts = Hosts(machine, folder / "two.yaml", ROOT / built.stdout.split()[-1])
    small = {"cpus": 0.5, "kv": {"blocks": 160}}
    spec = {
        "name": "two",
        "model": {"source": tiny_model(), "dtype": "float32", "max_context": 1024},
        "pools": {pool: {"accelerator": "cpu", "labels": {"pool": pool}} for pool in ("a", "b")},
        "roles": {"prefill": {"pool": "a", **small}, "decode": {"pool": "b", **small}},
        "network": {"host": "node", "tls": Authority(machine.folder / "tls").peer().model_dump()},
        "limits": {"drain_timeout_s": 5},
    }
    hosts.spec.write_text(yaml.safe_dump(spec))
    both = ["--block", "--num-cpus=2", "--object-store-memory=80000000"]
    head = [
        "--head",
        "--port=6379",
        "--dashboard-port=8265",
        f"--dashboard-host={A}",
        f"--temp-dir={machine.folder / 'a'}",
    ]
    start = "/usr/sbin/ip", "netns", "exec"
    machine.start(*start, "tc-a", "ray", "start", *head, f"--node-ip-address={A}", "--labels=pool=a", *both)
    until(
        lambda: "healthy" in hosts.on("tc-a", "ray", "health-check", f"--address={A}:6379").stdout or answers(hosts), 90
    )
    own = f"--temp-dir={machine.folder / 'b'}"
    machine.start(
        *start, "tc-b", "ray", "start", f"--address={A}:6379", f"--node-ip-address={B}", "--labels=pool=b", own, *both
    )
    planned = "tercet", "plan", str(hosts.spec), "--address", f"{A}:6379"
    until(lambda: B in hosts.on("tc-a", *planned).stdout, 120)
    return hosts


def answers(hosts: Hosts) -> bool:
    script = f"import socket; socket.create_connection(('{A}', 8265), 1)"
    return hosts.on("tc-a", "python", "-c", script).returncode == 0


@pytest.fixture(scope="module")
def serving(hosts: Hosts) -> Hosts:
    hosts.submit("two")
    until(lambda: hosts.is_ready() or hosts.outcome("two"), 200)
    assert hosts.outcome("two") == "", hosts.ray("logs", "two").stdout
    return hosts


def test_kv_crosses_from_host_to_host_and_tokens_are_those_of_one(serving):
    before = crossed()
    tokens = serving.ask()
    assert crossed() - before > 10_000  # of KV and of the stream to the gateway
    status = serving.on("tc-a", "tercet", "status", "--address", f"{A}:6379", "--json")
    assert status.returncode == 0, status.stderr
    assert re.search(rf'"rpc_address": "{re.escape(A)}:', status.stdout)
    assert re.search(rf'"rpc_address": "{re.escape(B)}:', status.stdout)
    assert '"transport": "tcp"' in status.stdout
    script = f"""
import asyncio
from tests.helpers import cluster, spec_of
from tercet.models.sources import load_tokenizer
from tercet.spec import ModelSpec

async def main():
    ids = load_tokenizer(ModelSpec(source={tiny_model()!r})).encode({PROMPT!r})
    async with cluster(spec_of("aggregated", decoders=1, source={tiny_model()!r})) as made:
        print(*[e.token_id for e in (await made.generate(ids, max_tokens=8, ignore_eos=True))[0]])

asyncio.run(main())
"""
    alone = serving.machine.run("python", "-c", script)
    assert alone.returncode == 0, alone.stderr
    assert [int(each) for each in alone.stdout.split()] == tokens


def test_all_of_the_job_runs_from_the_wheel_that_it_brought(serving):
    version = serving.wheel.name.split("-")[1]
    script = f"import urllib.request; print(urllib.request.urlopen('{URL}/metrics').read().decode())"
    assert f'version="{version}"' in serving.on("tc-a", "python", "-c", script).stdout
    told = serving.on("tc-a", "tercet", "status", "--address", f"{A}:6379", "--json")
    for worker in json.loads(told.stdout)["workers"].values():
        environment = Path(f"/proc/{worker['pid']}/environ").read_bytes().decode().split("\0")
        (path,) = (line for line in environment if line.startswith("PYTHONPATH="))
        assert "/py_modules_files/" in path


def test_nothing_but_peers_gets_a_word_from_the_ports_between_hosts(serving):
    """What listens on the cable speaks TLS, or is Ray's, which takes a token."""
    told = serving.on("tc-b", "ss", "-ltnpH").stdout
    ours = [line.split()[3] for line in told.splitlines() if "ray::WorkerAct" in line and line.split()[3].startswith(B)]
    assert ours
    for address in ours:
        host, port = address.rsplit(":", 1)
        said = serving.on("tc-a", "python", "-c", SPEAKS_PLAIN, host, port).stdout.strip()
        assert said in ("", "b''", "b'\\x15'"), (address, said)  # nothing, or an alert of TLS


def test_without_the_token_nobody_submits_a_job(serving):
    variables = dict(serving.machine.variables)
    serving.machine.variables |= {"RAY_AUTH_MODE": "disabled"}
    try:
        done = serving.ray("submit", "--no-wait", "--", "id")
    finally:
        serving.machine.variables = variables
    assert done.returncode != 0
    assert re.search("401|authentication|token", (done.stdout + done.stderr).lower())


def test_logs_and_stop_which_drains(serving):
    assert "ready: " in serving.ray("logs", "two").stdout
    assert serving.ray("stop", "two").returncode == 0
    assert serving.outcome("two") in ("STOPPED", "SUCCEEDED")
    until(lambda: not serving.is_ready(), 30)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("roles.decode.replicas=40", "does not fit|no room|CPU"),
        ("model.source=/none/model.gguf", "/none/model.gguf"),
        ("pools.b.labels={pool: c}", "pool=c|pool: c|labels"),
        ("modell={}", "modell"),
    ],
)
def test_a_job_that_fails_says_why(serving, wrong, says):
    name = f"wrong-{abs(hash(wrong))}"
    serving.submit(name, f"name={name[:20]}", wrong)
    assert until(lambda: serving.outcome(name), 120) == "FAILED"
    logs = serving.ray("logs", name).stdout
    assert re.search(says, logs), logs
    assert "Traceback" not in logs
