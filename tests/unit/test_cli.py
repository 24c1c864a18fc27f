"""The command as a user types it, where no Ray is needed: exit codes, one line on stderr, nothing started."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tercet.cluster import run_file
from tercet.cluster.cli import app
from tercet.cluster.run_file import RunFile, Served
from tercet.cluster.spec_file import load_spec
from tercet.errors import ClusterError, SpecError
from tercet.transfer.transports.nixl import NixlTransport
from tercet.transfer.transports.table import ALL, usable
from tercet.transfer.transports.ucx import UcxTransport
from tests.certificates import Authority

ROOT = Path(__file__).parents[2]
TERCET = Path(sys.executable).parent / "tercet"


def tercet(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TERCET, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", **env}
    )


def test_version_and_validate():
    assert tercet("--version").stdout.startswith("tercet ")
    done = tercet("validate", "configs/local.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 prefill, 2 decode" in done.stdout


@pytest.mark.parametrize("given", [[], ["roles.decode.cuda_graphs=off", "transfer.links=3", "pools.cpu.labels.zone=a"]])
def test_spec_prints_every_key_and_is_read_again(given, tmp_path):
    settings = [part for setting in given for part in ("--set", setting)]
    done = tercet("spec", "configs/local.yaml", *settings)
    assert done.returncode == 0
    (tmp_path / "whole.yaml").write_text(done.stdout)
    assert load_spec(tmp_path / "whole.yaml", ()) == load_spec(ROOT / "configs/local.yaml", given)
    for key in ("#max_inflight_requests: 256", "cuda_graphs:", "#heartbeat_s: 2.0  # at most half of lease_s"):
        assert key in done.stdout
    said = load_spec(tmp_path / "whole.yaml", ())
    assert said.model_fields_set == load_spec(ROOT / "configs/local.yaml", given).model_fields_set


def test_plan_shows_every_member_and_starts_nothing():
    done = tercet("plan", "configs/local.yaml", "--set", "roles.decode.replicas=3")
    assert done.returncode == 0
    rows = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    members = [(member.strip(), role.strip()) for member, role in rows if member.strip()]
    decodes = [(f"worker-{number}", "decode") for number in (1, 2, 3)]
    assert members == [("gateway", ""), ("worker-0", "prefill"), *decodes]


def test_what_is_printed_as_json_says_the_same():
    plan = json.loads(tercet("plan", "configs/local.yaml", "--json").stdout)
    assert [(w["member"], w["role"], w["needs"]) for w in plan["workers"]] == [
        ("worker-0", "prefill", {"CPU": 0.5}),
        *((f"worker-{number}", "decode", {"CPU": 0.5}) for number in (1, 2)),
    ]
    assert plan["gateway"]["http"] == "127.0.0.1:8000"
    valid = json.loads(tercet("validate", "configs/local.yaml", "--json").stdout)
    assert (valid["valid"], valid["roles"]) == (True, {"prefill": 1, "decode": 2})
    wrong = tercet("validate", "configs/local.yaml", "--json", "--set", "topology=pdx")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_plan_shows_an_address_that_can_be_used():
    done = tercet("plan", "configs/local.yaml", "--set", "gateway.http.host=::1", COLUMNS="200")
    assert "gateway at [::1]:8000 (HTTP) and 127.0.0.1:50051 (gRPC)" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "want"),
    [
        (["validate", "none.yaml"], 2, "none.yaml: no such file"),
        (["plan", "configs/local.yaml", "--set", "roles.decode.replicas=0"], 2, "must be at least 1, got 0"),
        (["serve", "configs/local.yaml", "--set", "topology=pdx"], 2, "topology: must be"),
        (["plan", "configs/local.yaml", "--set", "pools.cpu.labels.zone=a"], 1, "no node carries the labels zone=a"),
        (["plan", "configs/local.yaml", "--set", "roles.prefill.cpu_affinity=[700]"], 2, "core 700 is not here"),
        (["plan", "configs/local.yaml", "--address", "127.0.0.1:1"], 1, "no Ray answers at 127.0.0.1:1"),
        (["serve", "configs/local.yaml", "--set", "ray.address=here"], 1, "Ray address 'here': want host:port"),
        (["serve", "configs/local.yaml", "--ready-file=/none/x"], 2, "--ready-file /none/x: cannot be written"),
        (["serve", "configs/local.yaml", "--ready-file=/tmp"], 2, "--ready-file /tmp: cannot be written"),
        (["validate", "configs/local.yaml", "--set", "model.source=package:nope"], 1, "'nope' is not installed"),
        (["down", "--name", "nobody"], 1, "no cluster named nobody is served on this machine (looked in "),
        (["status", "--name", "nobody"], 1, "no cluster named nobody is served"),
    ],
)
def test_a_fault_is_one_line_and_an_exit_code(args, code, want):
    done = tercet(*args)
    assert done.returncode == code
    assert want in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_stale_address_file_does_not_hang(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    done = tercet("plan", "configs/local.yaml", "--address", "auto", RAY_TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "no Ray runs on this machine" in done.stderr


def test_the_command_imports_neither_torch_nor_ray():
    code = "import sys, tercet.cluster.cli; sys.exit(bool({'torch', 'ray', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_run_file_is_a_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(
        ClusterError, match=rf"no cluster is served .*looked in {tmp_path}/tercet-.*, which TMPDIR names"
    ):
        run_file.find(None)
    with RunFile("one") as mine:
        with pytest.raises(ClusterError, match="cluster one is just starting"):
            run_file.find_reachable(None)
        mine.write(Served("one", os.getpid(), "10.0.0.1:6379", "http://127.0.0.1:8000"))
        assert run_file.find(None).http_url == "http://127.0.0.1:8000"
        with pytest.raises(ClusterError, match="a cluster named one is already served"), RunFile("one"):
            pass
        with RunFile("two"), pytest.raises(ClusterError, match=r"--name.*one, two"):
            run_file.find(None)
    assert run_file.served() == []
    left_behind = tmp_path / next(tmp_path.iterdir()).name / "one.json"
    left_behind.write_text('{"name": "one", "pid": 1}')
    assert run_file.served() == []


def test_doctor_names_every_transport_and_what_it_lacks(monkeypatch):
    monkeypatch.setattr(NixlTransport, "missing", classmethod(lambda cls: "the nixl library is not installed"))
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "usable" in shown.output
    for cls in ALL:
        assert f"transport {cls.name}" in shown.output
    assert "the nixl library is not installed; or, in a checkout, `make extras`" in shown.output
    for name in ("accelerator gpu", "accelerator npu", "kernels native", "kernels triton"):
        assert name in shown.output
    assert "needs torch_npu, which is not installed" in shown.output


def doctor(*words):
    """name -> finding. In a process of its own, since libraries of transports print."""
    command = [str(Path(sys.executable).parent / "tercet"), "doctor", *words, "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    return {each["name"]: each for each in json.loads(shown.stdout)}


def test_doctor_measures_what_moves_kv_here_and_says_it_as_json():
    found = doctor()
    for name in ("shm", "tcp", "torch"):
        assert re.search(r"can be used: \d+\.\d GB/s, \d+ us", found[f"transport {name}"]["told"])
    assert f"torch {torch.__version__}" in found["versions"]["told"]


def test_doctor_says_of_a_spec_what_is_here_and_who_would_listen_where(tmp_path):
    (tmp_path / "keys.yaml").write_text("keys: []")
    peer = Authority(tmp_path / "tls").peer()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = {
            "gateway.http.port": port,
            "gateway.grpc": "{host: 0.0.0.0, port: 0}",
            "gateway.api_keys": tmp_path / "keys.yaml",
            "gateway.tls": "{certificate: /none.pem, key: /none.key}",
            "network": json.dumps({"host": "node", "tls": peer.model_dump()}),
        }
        sets = [part for key, value in wanted.items() for part in ("--set", f"{key}={value}")]
        found = doctor("configs/local.yaml", *sets)
    assert not found["gateway.http"]["good"]
    assert f"port {port} on 127.0.0.1 is in use" in found["gateway.http"]["told"]
    assert "for whoever reaches it, with a key and TLS" in found["gateway.grpc"]["told"]
    assert "has 0 keys" in found["gateway.api_keys"]["told"]
    assert not found["gateway.tls"]["good"]
    assert re.search(r"peers are tercet, by .*; TCP with it: \d+\.\d GB/s", found["network.tls"]["told"])
    assert "on the address of their Ray node" in found["workers"]["told"]
    assert "GB in 1 file" in found["model"]["told"]


@pytest.mark.parametrize("command", [["plan"], ["validate", "--set", "ray.address=local"]])
def test_a_transport_that_is_not_here_is_missed_where_all_workers_are_here(monkeypatch, command):
    monkeypatch.setattr(UcxTransport, "missing", classmethod(lambda cls: "no ucxx; pip install it"))
    args = [*command, "configs/local.yaml", "--set", "transfer.transport=ucx"]
    shown = CliRunner().invoke(app, args)
    assert isinstance(shown.exception, SpecError)


def test_a_transport_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(UcxTransport, "missing", classmethod(lambda cls: "no ucxx; pip install it"))
    with pytest.raises(SpecError, match="ucx cannot be used here: no ucxx; pip install it"):
        usable("ucx")
    assert "ucx" not in [t.name for t in usable("auto")]
    assert [t.name for t in usable("tcp")] == ["tcp"]
