"""The cluster on Ray, as processes: a real model, two Ray nodes on one machine, a local Ray, and a Ray job."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine import Machine, Served, answers, free_port, is_ready, new_machine, serve, settings, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = new_machine()
    token = made.folder / "token"
    token.write_text("0123456789abcdef" * 4)
    made.variables.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    yield made
    made.clear()


@pytest.fixture(scope="module")
def ray_head(machine: Machine) -> Iterator[tuple[str, str]]:
    """Two Ray nodes on this machine, labelled pool=a and pool=b. Gives (GCS address, dashboard URL)."""
    gcs, dashboard = f"127.0.0.1:{free_port()}", free_port()
    both = ["--block", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=80000000"]
    head = machine.start(
        "ray", "start", "--head", f"--port={gcs.partition(':')[2]}", "--labels=pool=a", *both,
        f"--dashboard-port={dashboard}", f"--temp-dir={machine.folder / 'ray'}",
    )  # fmt: skip
    until(lambda: answers(gcs))
    # A folder of its own, as on a machine of its own: Ray unpacks a job's files into it, over what lies there.
    own = f"--temp-dir={machine.folder / 'node'}"
    node = machine.start("ray", "start", f"--address={gcs}", "--labels=pool=b", own, *both)
    until(lambda: "pool=b" in machine.run("tercet", "plan", "configs/local.yaml", "--address", gcs, "--set",
                                          "pools.cpu.labels.pool=b").stdout, 120)  # fmt: skip
    yield gcs, f"http://127.0.0.1:{dashboard}"
    for process in (node, head):
        process.terminate()
        process.wait(40)
    until(lambda: not machine.left(), 20)


POOLS = ("pools={a: {labels: {pool: a}}, b: {labels: {pool: b}}}", "roles.prefill.pool=a", "roles.decode.pool=b")


@pytest.fixture(scope="module")
def on_two_nodes(machine: Machine, ray_head: tuple[str, str]) -> Iterator[Served]:
    served = serve(machine, "two", f"ray.address={ray_head[0]}", *POOLS)
    yield served
    served.process.terminate()
    served.process.wait(40)


def test_pools_bind_to_nodes_by_label(on_two_nodes, ray_head):
    workers = on_two_nodes.status("--address", ray_head[0])["workers"]
    raylets = sorted((worker["role"], raylet_of(worker["pid"])) for worker in workers.values())
    (decode, on_b), (_, also_b), (prefill, on_a) = raylets
    assert (decode, prefill) == ("decode", "prefill")
    assert on_b == also_b != on_a
    assert '"pool":"a"' in on_a
    assert '"pool":"b"' in on_b
    assert "Paris" in on_two_nodes.ask()


def raylet_of(pid: int) -> str:
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").replace(b": ", b":").decode()


@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_killed_or_hung_worker_comes_back_with_the_next_epoch(on_two_nodes, blow):
    before = on_two_nodes.status()["workers"]["worker-1"]
    os.kill(before["pid"], blow)

    def replaced() -> Any:
        now = on_two_nodes.status().get("workers", {}).get("worker-1", {})
        return now.get("epoch") == before["epoch"] + 1 and now

    assert until(replaced, 60)["pid"] != before["pid"]
    assert "Paris" in on_two_nodes.ask()


def test_a_second_cluster_of_the_same_name_is_refused(on_two_nodes, ray_head, tmp_path):
    done = on_two_nodes.machine.run("tercet", "serve", "configs/local.yaml", "--set", "name=two")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "a cluster named two is already served" in done.stderr


def test_down_by_address_leaves_nothing_of_the_cluster(on_two_nodes, ray_head):
    machine, workers = on_two_nodes.machine, on_two_nodes.status()["workers"]
    done = machine.run("tercet", "down", "--name", "two", "--address", ray_head[0])
    assert (done.returncode, done.stdout) == (0, "cluster two is down\n"), done.stderr
    assert on_two_nodes.process.wait(30) == 0, on_two_nodes.process.log.read_text()
    until(lambda: not any(Path(f"/proc/{w['pid']}").exists() for w in workers.values()), 20)
    done = machine.run("tercet", "down", "--address", ray_head[0])
    assert "no cluster in the Ray at" in done.stderr


def test_the_same_file_goes_through_ray_job_submit(machine, ray_head):
    http, job = free_port(), "tercet-test"
    sets = settings("job", http, "roles.decode.replicas=1")
    submit = machine.run(
        "ray", "job", "submit", f"--address={ray_head[1]}", "--working-dir=.", "--no-wait", f"--submission-id={job}",
        "--", "tercet", "serve", "configs/local.yaml", *sets,
    )  # fmt: skip
    assert submit.returncode == 0, submit.stderr
    served = Served(machine, None, "job", http)
    until(lambda: is_ready(served.client()), 120)
    assert "Paris" in served.ask()
    done = machine.run("tercet", "down", "--name", "job", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"cluster": "job", "down": True})

    def outcome() -> str:
        told = machine.run("ray", "job", "status", f"--address={ray_head[1]}", job)
        return next((w for w in ("SUCCEEDED", "FAILED", "STOPPED") if w in (told.stdout + told.stderr).upper()), "")

    assert until(outcome, 60) == "SUCCEEDED"


@pytest.fixture
def alone() -> Iterator[Machine]:
    """A machine without a Ray. After the test no process and no shared memory may be left."""
    shared = {p.name for p in Path("/dev/shm").iterdir()}
    machine = new_machine()
    yield machine
    try:
        until(lambda: not machine.left(), 20)
        assert {p.name for p in Path("/dev/shm").iterdir()} <= shared
        assert not list(machine.folder.glob("tercet-*/*"))
    finally:
        machine.clear()


def test_ctrl_c_ends_a_local_ray_without_a_trace(alone):
    served = serve(alone, "local")
    assert "Paris" in served.ask()
    assert served.status()["ready"] is True  # joins the Ray that `serve` keeps for itself
    os.killpg(served.process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
    assert served.process.wait(40) == 0, served.process.log.read_text()
    assert "Traceback" not in served.process.log.read_text()


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("model.source=/no/such/model.gguf", "/no/such/model.gguf"),
        ("gateway.http.port={taken}", "port {taken} on 127.0.0.1 is in use"),
    ],
)
def test_what_keeps_it_from_standing_is_one_line(alone, setting, want):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        sets = settings("bad", free_port(), setting.replace("{taken}", port))
        done = alone.run("tercet", "serve", "configs/local.yaml", *sets)
    assert done.returncode == 1
    assert want.replace("{taken}", port) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stdout
