"""A machine for tests that start Ray: a folder, an environment, and every process that was started in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tercet.client import Client
from tercet.errors import TercetError
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return found


@dataclass
class Machine:
    """A folder, an environment with a mark, and what was started in it."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: f"TERCET_TEST={secrets.token_hex(8)}")
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        # Without Ray's own settings: tests that ran in this process before have made some.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return inherited | {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "TMPDIR": str(self.folder),  # run files and Ray's session lie here
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "TERCET_TEST": self.mark.partition("=")[2],
            **self.variables,
        }

    def tiny_spec(self, name: str) -> tuple[Path, int]:
        """A spec file of a small random model over one prefill and one decode worker, and its HTTP port."""
        port, path = free_port(), self.folder / "tiny.yaml"
        small = {"cpus": 0.25, "pool": "cpu", "kv": {"blocks": 160}}
        spec = {
            "name": name,
            "model": {"source": tiny_model(), "dtype": "float32", "max_context": 1024},
            "topology": "pd",
            "pools": {"cpu": {"accelerator": "cpu"}},
            "roles": {"prefill": small, "decode": small},
            "gateway": {"http": {"port": port}, "grpc": {"port": 0}},
            "ray": {"address": "local"},
        }
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path, port

    def start(self, *command: str) -> subprocess.Popen[str]:
        path = self.folder / f"{secrets.token_hex(4)}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, text=True, start_new_session=True
            )
        process.log = path
        self.started.append(process)
        return process

    def run(self, *command: str, seconds: float = 90.0, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, input=text, capture_output=True, text=True, timeout=seconds
        )

    def left(self) -> dict[int, str]:
        """pid -> command line of the live processes that were started here."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._is_from_here(process):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:  # it ended while we looked
                continue
        return found

    def _is_from_here(self, process: Path) -> bool:
        """It carries the mark; or, since a process that gives itself a title writes over that, has a file from here."""
        if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        files = [os.readlink(process / "fd" / number) for number in os.listdir(process / "fd")]
        return any(file.startswith(f"{self.folder}/") for file in files)

    def clear(self) -> None:
        """End what a failed test left."""
        for process in self.started:
            process.terminate()
        with contextlib.suppress(AssertionError):
            until(lambda: not self.left(), 15)
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def new_machine(**variables: str) -> Machine:
    # Ray's sockets lie below this folder and a socket's path may have 107 bytes, so it must be a short one.
    return Machine(Path(tempfile.mkdtemp(prefix="tc.", dir="/tmp")), variables)


@dataclass
class Served:
    machine: Machine
    process: subprocess.Popen[str]
    name: str
    http: int

    @property
    def log(self) -> str:
        return self.process.log.read_text()

    def note(self) -> dict[str, Any]:
        """Its run file."""
        return json.loads(next(self.machine.folder.glob(f"tercet-*/{self.name}.json")).read_text())

    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.http}", timeout_s=60.0)

    def status(self, *where: str) -> dict[str, Any]:
        done = self.machine.run("tercet", "status", "--name", self.name, "--json", *where)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def ask(self) -> str:
        return self.client().chat("What is the capital of France?", temperature=0, max_tokens=12).text


SMALL = (  # one worker that starts in a moment
    "topology=aggregated",
    "roles={aggregated: {pool: cpu, cpus: 0.5, kv: {blocks: 64}}}",
    "model.max_context=1024",
)


def settings(name: str, http: int, *more: str) -> list[str]:
    wanted = [f"name={name}", f"gateway.http.port={http}", "gateway.grpc.port=0", "limits.drain_timeout_s=5", *more]
    return [part for setting in wanted for part in ("--set", setting)]


def begin(machine: Machine, name: str, *more: str) -> Served:
    """Start to serve, and do not wait."""
    http = free_port()
    process = machine.start("tercet", "serve", "configs/local.yaml", *settings(name, http, *more))
    return Served(machine, process, name, http)


def serve(machine: Machine, name: str, *more: str) -> Served:
    served = begin(machine, name, *more)
    process = served.process
    # Not /ready: that is true with the first live pair, while other workers may still start.
    until(lambda: process.poll() is not None or "ready: " in process.log.read_text(), 120)
    assert process.poll() is None, process.log.read_text()
    assert is_ready(served.client())
    return served


def is_ready(client: Client) -> bool:
    try:
        return client.is_ready()
    except TercetError:
        return False


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
