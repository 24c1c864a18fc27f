"""The scripts of deploy/ray start two Ray nodes with a token; the chart's script serves the chart's spec on them."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tercet.cluster.spec_file import load_spec
from tests.deploy import charts
from tests.machine import ROOT, Machine, free_port, new_machine, until
from tests.tiny import tiny_model

FILES = charts.CHART / "files"
SCRIPTS = ROOT / "deploy" / "ray"
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@dataclass
class Cluster:
    machine: Machine
    jobs: str  # address of the jobs API
    spec: Path
    http: str

    def serve_job(self, action: str, stop_s: int, *command: str) -> subprocess.Popen[str]:
        words = [action, f"http://{self.jobs}", "demo", str(stop_s), *(["--", *command] if command else [])]
        return self.machine.start("python", str(FILES / "serve_job.py"), *words)

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run("python", str(FILES / "ask.py"), *words)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    machine = new_machine()
    try:
        yield started(machine)
    finally:
        machine.clear()


def started(machine: Machine) -> Cluster:
    token = machine.folder / "token"
    token.write_text("of-this-test\n")
    machine.variables |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
    jobs = starts(machine, "head.sh", gcs=True)
    starts(machine, "node.sh", "127.0.0.1", "cpu", "--num-cpus=2")
    return Cluster(machine, f"127.0.0.1:{jobs}", *small_spec(machine.folder))


def starts(machine: Machine, script: str, *words: str, gcs: bool = False) -> int:
    """-> the port of the jobs API, if it is a head's. Ray gives a node 30 s, which a busy machine may exceed."""
    for _ in range(3):
        jobs = free_port()
        ports = [f"--dashboard-agent-listen-port={free_port()}"]
        if gcs:
            machine.variables["RAY_PORT"] = str(free_port())
            ports += [f"--dashboard-port={jobs}", f"--ray-client-server-port={free_port()}"]
        # Not `run`: what it starts keeps its pipes open.
        starting = machine.start(str(SCRIPTS / script), *words, "--node-ip-address=127.0.0.1", *ports)
        if starting.wait(200) == 0:
            return jobs
        said = starting.log.read_text()
        assert "timed out during startup" in said, said
    raise AssertionError(said)


def small_spec(folder: Path) -> tuple[Path, str]:
    """What the chart renders, but for a model that is small."""
    values = {
        "ray": {"mode": "plain"},
        "model": {"dtype": "float32", "max_context": 1024},
        "pools": {"cpu": {"accelerator": "cpu", "replicas": 1, "resources": {"limits": {"cpu": 2, "memory": "4Gi"}}}},
        "roles": {role: {"pool": "cpu", "cpus": 0.25, "kv": {"blocks": 160}} for role in ("prefill", "decode")},
        "gateway": {"host": "127.0.0.1", "httpPort": free_port(), "grpcPort": free_port()},
    }
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    spec = charts.spec_of(charts.parsed(charts.template("-f", str(path))))
    spec["model"]["source"] = tiny_model()
    path.write_text(yaml.safe_dump(spec))
    return path, f"http://127.0.0.1:{values['gateway']['httpPort']}"


def test_the_charts_container_serves_and_drains(cluster):
    serving = cluster.serve_job("run", 40, "tercet", "serve", str(cluster.spec))
    until(lambda: cluster.ask("get", f"{cluster.http}/ready").returncode == 0, 120)
    answer = cluster.ask("chat", cluster.http, "What is it?")
    assert answer.returncode == 0, answer.stderr
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(60) == 0
    said = serving.log.read_text()
    assert "ready: http" in said
    assert re.search(r"demo-\w+: (STOPPED|SUCCEEDED)", said)
    assert cluster.ask("get", f"{cluster.http}/ready").returncode != 0


def test_a_job_goes_on_when_its_container_is_killed_and_is_followed_again(cluster):
    sleeping = cluster.serve_job("run", 10, "sh", "-c", "echo begun; exec sleep 120")
    until(lambda: "begun" in sleeping.log.read_text(), 60)
    sleeping.kill()
    again = cluster.serve_job("run", 10, "sh", "-c", "echo another")
    until(lambda: "begun" in again.log.read_text(), 60)
    stopping = cluster.serve_job("stop", 10)  # what Ray's container does before it ends
    assert stopping.wait(60) == 0
    assert again.wait(60) == 0
    assert "another" not in again.log.read_text()


def test_a_job_that_fails_has_its_container_started_anew(cluster):
    failing = cluster.serve_job("run", 10, "sh", "-c", "exit 3")
    assert failing.wait(60) == 1


def test_who_has_no_token_serves_nothing(cluster):
    done = cluster.machine.run("env", "RAY_AUTH_TOKEN=wrong", str(SCRIPTS / "serve.sh"), cluster.jobs, "spec.yaml")
    assert done.returncode != 0
    assert "auth" in (done.stdout + done.stderr).lower()


def test_the_script_serves_a_spec_by_its_path(cluster):
    done = cluster.machine.run(str(SCRIPTS / "serve.sh"), cluster.jobs, "/no/such/spec.yaml")
    assert done.returncode != 0
    assert "/no/such/spec.yaml" in done.stdout + done.stderr


def test_ray_up_takes_the_cluster_file():
    validate_config(prepare_config(yaml.safe_load((SCRIPTS / "cluster.yaml").read_text())))


def test_the_spec_beside_it_is_one():
    spec = load_spec(SCRIPTS / "spec.yaml")
    assert spec.pools["workers"].labels == {"pool": "workers"}
