"""How long a request still waits for its KV when its last layer has been computed, over a shaped link.

    python -m benchmarks.transfer_tail --rounds 7 --result tail.json

Two network namespaces, a veth pair between them, `tc tbf` on the way from the prefill side (needs root). A request of
30 layers is pushed layer by layer, one every `--compute` of a layer's transfer time, as a model would compute them. The
tail is the time from the last push until `Released`. It is given in transfer times of a layer: the median time in which
a plain socket takes one layer across the same link and gets a byte back. Beside it: the same request pushed at once.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import progress
from benchmarks.machine import facts
from benchmarks.transfer_pairs import TRANSPORTS, transport_of
from tercet.core import Ticket
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.protocol.facts import Complete, Granted, Noted, OpDone, Released
from tercet.transfer.transports.contract import MoverConfig

LAYOUT = KvLayout(layers=30, blocks=64, block_size=16, kv_heads=4, head_dim=64, dtype="bfloat16")
BLOCKS = list(range(64))  # 1,024 tokens: 1 MiB a layer
LAYER_BYTES = len(BLOCKS) * LAYOUT.block_bytes
EPOCH, ACK = 1, b"k"
ADDRESSES = "10.98.0.1", "10.98.0.2"
SETTLE_S = 0.2  # between requests: the shaper's burst fills again


@contextmanager
def two_hosts(megabits: int) -> Iterator[list[str]]:
    """-> the command that enters the prefill side's host."""
    name, here, there = "tercet-tail", "tail-a", "tail-b"
    enter = ["ip", "-n", name]
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name],
        ["ip", "addr", "add", f"{ADDRESSES[0]}/24", "dev", here],
        ["ip", "link", "set", here, "up"],
        [*enter, "addr", "add", f"{ADDRESSES[1]}/24", "dev", there],
        [*enter, "link", "set", there, "up"],
        [*enter, "link", "set", "lo", "up"],
        f"tc -n {name} qdisc add dev {there} root tbf rate {megabits}mbit burst 128kb latency 100ms".split(),
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True)
        yield f"ip netns exec {name} unshare --ipc --pid --fork --mount-proc --kill-child".split()
    finally:
        subprocess.run(["ip", "link", "del", here], check=False)
        subprocess.run(["ip", "netns", "del", name], check=False)


def mover(name: str) -> MoverConfig:
    return MoverConfig(name, "model", "token", 30.0, 2.0, integrity=True)


def ticket_of(number: int) -> Ticket:
    return Ticket(f"request-{number}", 0, EPOCH)


def plain_times(address: str, rounds: int) -> list[float]:
    """Seconds of a layer over a plain socket, an answer included."""
    host, port = address.split(":")
    payload, found = os.urandom(LAYER_BYTES), []
    with socket.create_connection((host, int(port))) as sock:
        for _ in range(rounds):
            time.sleep(SETTLE_S)
            began = time.perf_counter()
            sock.sendall(payload)
            sock.recv(1)
            found.append(time.perf_counter() - began)
    return found


def answer(listener: socket.socket) -> None:
    """Take layers in, and say so for each."""
    sock, _ = listener.accept()
    buffer = bytearray(LAYER_BYTES)
    with sock:
        while sock.recv_into(buffer, LAYER_BYTES, socket.MSG_WAITALL) == LAYER_BYTES:
            sock.sendall(ACK)


def tail_of(sender: KvSender, events: queue.SimpleQueue[Any], endpoint: str, number: int, period: float) -> float:
    """Seconds from the last push of one request until it was released; a layer every `period` seconds."""
    ticket = ticket_of(number)
    sender.open(ticket, endpoint, len(BLOCKS) * LAYOUT.block_size, time.monotonic() + 60)
    expect(events, Granted)
    began = time.perf_counter()
    for layer in range(LAYOUT.layers):
        time.sleep(max(0.0, began + (layer + 1) * period - time.perf_counter()))
        sender.push(ticket, layer, 0, BLOCKS)
    pushed = time.perf_counter()
    sender.finish(ticket, b"note")
    expect(events, Released)
    ended = time.perf_counter()
    expect(events, OpDone)
    return ended - pushed


def expect(events: queue.SimpleQueue[Any], kind: type) -> None:
    event = events.get(timeout=60)
    if not isinstance(event, kind):
        raise SystemExit(f"expected {kind.__name__}, got {event}")


def prefill(transport: str, endpoint: str, plain: str, rounds: int, compute: float) -> dict[str, list[float]]:
    """The prefill side, in its own process and namespace."""
    layer = plain_times(plain, rounds)
    region, events = Region(LAYOUT), queue.SimpleQueue[Any]()
    region.view[:] = os.urandom(len(region.view))
    sender = KvSender(mover("prefill"), region, [transport_of(transport)()], events.put)
    found: dict[str, list[float]] = {"layer": layer, "tail": [], "at_once": []}
    for number in range(2 * rounds):
        time.sleep(SETTLE_S)
        layered = number % 2 == 0
        period = compute * statistics.median(layer) if layered else 0.0
        found["tail" if layered else "at_once"].append(tail_of(sender, events, endpoint, number, period))
    sender.stop()
    return found


def measure(transport: str, enter: list[str], rounds: int, compute: float) -> dict[str, list[float]]:
    events, region = queue.SimpleQueue[Any](), Region(LAYOUT)
    receiver = KvReceiver(mover("decode"), EPOCH, region, [transport_of(transport)()], events.put)
    endpoint = receiver.start(ADDRESSES[0]).encode()
    with socket.create_server((ADDRESSES[0], 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        arguments = [transport, endpoint, f"{ADDRESSES[0]}:{listener.getsockname()[1]}", str(rounds), str(compute)]
        command = [*enter, sys.executable, "-m", "benchmarks.transfer_tail", "prefill", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for number in progress.rounds(range(2 * rounds), transport):
            receiver.admit(ticket_of(number), 0, BLOCKS)
            expect(events, Noted)
            expect(events, Complete)
        printed, _ = process.communicate(timeout=60)
    receiver.stop()
    found: dict[str, list[float]] = json.loads(printed.splitlines()[-1])
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    rate: Annotated[int, typer.Option(min=1, help="of the link, Mbit/s")] = 1000,
    compute: Annotated[float, typer.Option(help="a layer's computation, in transfer times of a layer")] = 1.5,
    only: Annotated[list[str] | None, typer.Option(help="a transport; may be given often. Default: all")] = None,
    result: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Print the tails; a goal that is missed makes no failure."""
    about = facts() | {"rounds": rounds, "rate_mbit": rate, "compute": compute}
    os.environ["UCX_TLS"] = "tcp"
    made = Table("transport", "a layer by a plain socket, ms", "tail, ms", "in layers (goal: 1.5)", "pushed at once")
    raw: dict[str, dict[str, list[float]]] = {}
    for name in only or [name for name in TRANSPORTS if name != "shm"]:
        why = transport_of(name).missing()
        if why is not None:
            print(f"not run: {name}: {why}")
            continue
        with two_hosts(rate) as enter:
            found = raw[name] = measure(name, enter, rounds, compute)
        layer, tail, at_once = (statistics.median(found[key]) for key in ("layer", "tail", "at_once"))
        made.add_row(name, f"{layer * 1e3:.1f}", f"{tail * 1e3:.1f}", f"{tail / layer:.2f}", f"{at_once / layer:.1f}")
    Console(width=120).print(made)
    if result is not None:
        result.write_text(json.dumps(about | {"seconds": raw}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["prefill"]:
        name, endpoint, plain, rounds, compute = sys.argv[2:]
        print(json.dumps(prefill(name, endpoint, plain, int(rounds), float(compute))))
    else:
        typer.run(main)
