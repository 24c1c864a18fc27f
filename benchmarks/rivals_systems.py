"""The serving engines that `benchmarks.rivals` compares: how each is found, started, asked and ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.engine import Transformers
from benchmarks.topologies import serve_command
from tercet.models.sources import locate
from tercet.spec import ModelSpec

THREADS = 2  # compute threads that each system has
CONTEXT = 2048  # tokens of a request at most
SLOTS = 16  # requests at once
START_S = 600.0  # the first start of a vLLM compiles for minutes
END_S = 60.0
LAST_LINES = 15


@dataclass(frozen=True)
class Given:
    """What the command line says of this machine. None: not said."""

    vllm: Path | None  # the command
    llama_server: Path | None  # the command
    hf_model: Path  # a Hugging Face directory, in bfloat16; where there is a vLLM it is made if it is not there


@dataclass(frozen=True)
class System:
    port: int
    command: Callable[[Given, int], list[str]]
    version: Callable[[Given], str]
    ready: str = "/health"  # answers 200 when a request would be
    missing: Callable[[Given], str | None] = lambda _: None  # why it cannot be started
    slow_start: bool = False  # minutes: it is not started in each round
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _tercet(port: int, spec: str, *settings: str) -> System:
    def command(_: Given, port: int) -> list[str]:
        return serve_command(f"rival-{port}", port, spec, [f"model.max_context={CONTEXT}", *settings])

    return System(port, command, lambda _: metadata.version("tercet"), ready="/ready")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:THREADS]


def _vllm(port: int, dtype: str) -> System:
    def command(given: Given, port: int) -> list[str]:
        options = {"dtype": dtype, "max-model-len": CONTEXT, "max-num-seqs": SLOTS, "host": "127.0.0.1", "port": port}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [str(given.vllm), "serve", str(given.hf_model), "--served-model-name", "smollm2", *flags]

    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"{_cores()[0]}-{_cores()[-1]}",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    return System(
        port,
        command,
        lambda given: _first_version(given.vllm),
        missing=lambda given: None if given.vllm else "no --vllm PATH",
        slow_start=True,
        env=environment,
    )


def _llama_cpp(port: int) -> System:
    def command(given: Given, port: int) -> list[str]:
        options = {"-m": locate(ModelSpec()), "-ngl": 0, "-t": THREADS, "-c": SLOTS * CONTEXT, "-np": SLOTS}
        options |= {"--host": "127.0.0.1", "--port": port}
        return [str(given.llama_server), *(str(part) for option in options.items() for part in option)]

    return System(
        port,
        command,
        lambda given: _first_version(given.llama_server),
        missing=lambda given: None if given.llama_server else "no --llama-server PATH",
    )


_ONE = ("roles.aggregated.replicas=1", f"roles.aggregated.threads={THREADS}")
_PINNED = (
    "roles.decode.replicas=1",
    *(f"roles.{r}.cpu_affinity=[{c}]" for r, c in zip(("prefill", "decode"), _cores(), strict=False)),
)
SYSTEMS: dict[str, System] = {
    "tercet": _tercet(18300, "configs/aggregated.yaml", *_ONE),
    "tercet-pd": _tercet(18310, "configs/local.yaml", *_PINNED),
    "tercet-gguf": _tercet(18340, "configs/aggregated.yaml", *_ONE, "model.dtype=gguf"),
    "llama.cpp": _llama_cpp(18350),
    "vllm": _vllm(18320, "bfloat16"),
    "vllm-float32": _vllm(18330, "float32"),
}


def _first_version(command: Path | None) -> str:
    """What `COMMAND --version` says first of a version; it may speak of other things before."""
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=False, timeout=START_S)
    found = re.search(r"^(?:version: *)?(\d+\.\d.*)$", done.stdout + done.stderr, re.MULTILINE)
    return found[1].strip() if found else "unknown"


def save_hf_model(folder: Path) -> None:
    """The model that `tercet` serves, as a Hugging Face directory in bfloat16."""
    path = locate(ModelSpec())
    Transformers(ModelSpec()).model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


@contextmanager
def serving(name: str, given: Given, logs: Path) -> Iterator[System]:
    """The system, ready, until the block ends. Ends the program if its port is taken, and with the system's last lines
    if it dies."""
    system, log = SYSTEMS[name], logs / f"{name}.log"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", system.port)) == 0:
            raise SystemExit(f"{name}: something answers on its port {system.port} already; end that first")
    with log.open("w") as file:
        process = subprocess.Popen(
            system.command(given, system.port),
            env={**os.environ, **system.env},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(name, system, process, log)
        yield system
    finally:
        _end(process)


def _wait_until_ready(name: str, system: System, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(system.url + system.ready, timeout=5):  # noqa: S310  # our own server
                return
        except OSError:
            time.sleep(0.3)
    code = process.poll()
    why = f"not ready after {START_S:.0f} s" if code is None else f"ended with code {code} before it was ready"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise SystemExit(f"{name} {why}. Its last lines:\n{last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
