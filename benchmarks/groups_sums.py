"""Sums by gloo and by shared memory, and the way of a step's plan to a rank and back: what a group adds to a step.

Every rank is a process of this host. Blocks of rounds of both kinds of sums take turns, so that noise hits both alike.
A round takes as long as its slowest rank.
"""

from __future__ import annotations

import os
import queue
import statistics
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.groups_ranks import ANSWER_S, FORK, HOST, SERVER, TOKEN
from tercet.core import SamplingParams, Ticket
from tercet.distributed.collectives import Collectives
from tercet.distributed.line import Line, Rendezvous, join
from tercet.distributed.meeting import Group
from tercet.distributed.place import Place
from tercet.distributed.setup import Setup, Venue, new_store, shared_memory
from tercet.distributed.talk import Talk
from tercet.engine.plan import Draw, Piece, StepPlan, pack

WIDTH = 576  # of SmolLM2-135M
ROWS = (1, 16, 256)
BLOCKS = 2  # times that each kind has its turn
WARM = 5  # rounds of a turn that do not count
BATCHES = (1, 8)  # of the plans

Seconds = dict[str, list[float]]  # "kind, bytes" -> of each round


def measure(ranks: int, rounds: int) -> dict[str, float]:
    """-> "sum by gloo, 2304 B" and the like -> median seconds."""
    pipe, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_rank_0, args=(theirs, ranks, rounds))
    process.start()
    theirs.close()
    try:
        if not pipe.poll(ANSWER_S):
            raise SystemExit(f"sums of {ranks} ranks took over {ANSWER_S:g} s")
        found: dict[str, float] = pipe.recv()
        return found
    except EOFError as error:
        raise SystemExit("rank 0 has died; what it wrote says why") from error
    finally:
        process.join(10)
        process.kill()
        process.join()


def slowest(of_ranks: list[Seconds]) -> dict[str, float]:
    """The median round; each takes as long as its slowest rank."""
    return {
        key: statistics.median(map(max, zip(*(seconds[key] for seconds in of_ranks), strict=True)))
        for key in of_ranks[0]
    }


def _rank_0(pipe: Connection, ranks: int, rounds: int) -> None:
    rendezvous = Rendezvous(HOST, TOKEN)
    for number in range(1, ranks):
        FORK.Process(target=_other, args=(rendezvous.endpoint, number, ranks, rounds), daemon=True).start()
    lines = rendezvous.joined(range(1, ranks), time.monotonic() + ANSWER_S, lambda: False)
    store, place = new_store(HOST), Place(0, ranks)
    memory = shared_memory(place, _venues("", ranks)["shared memory"])
    assert memory is not None
    for line in lines.values():
        line.send("store", f"{HOST}:{store.port}")
        line.send_fd(memory)
    of_ranks = [_sums(place, f"{HOST}:{store.port}", memory, rounds)]
    of_ranks += [line.receive()[1] for line in lines.values()]
    pipe.send(slowest(of_ranks) | _plans(lines[1], rounds))


def _other(endpoint: str, number: int, ranks: int, rounds: int) -> None:
    """The process of rank 1, 2 ...; it ends with rank 0."""
    line, ended = join(endpoint, number, TOKEN, ANSWER_S), threading.Event()
    _, store = line.receive()
    line.send("seconds", _sums(Place(number, ranks), store, line.receive_fd(), rounds))
    talk = Talk(line, lambda _: ended.set())
    talk.start({"step": lambda step, parts: talk.tell("drawn", step, parts)}, {})
    ended.wait()


def _venues(store: str, ranks: int) -> dict[str, Venue]:
    """Ranks sum through shared memory if they are told that they are together, else by torch."""
    cores = len(os.sched_getaffinity(0))
    return {"gloo": Venue(store, (), cores, ()), "shared memory": Venue(store, tuple(range(ranks)), cores, ())}


def _sums(place: Place, store: str, memory: int, rounds: int) -> Seconds:
    torch.set_num_threads(1)
    kinds = {}
    for kind, venue in _venues(store, place.ranks).items():
        setup = Setup(place, HOST, torch.device("cpu"), ANSWER_S, None, Group("", TOKEN, 1, 0))
        kinds[kind] = setup.ranks(venue, memory if kind == "shared memory" else None).tensor
    return _timed(kinds, rounds)


def _timed(kinds: Mapping[str, Collectives], rounds: int) -> Seconds:
    found: Seconds = {}
    for _ in range(BLOCKS):
        for kind, sums in kinds.items():
            for rows in ROWS:
                x = torch.zeros(rows, WIDTH)
                seconds = [_seconds(sums, x) for _ in range(WARM + -(-rounds // BLOCKS))][WARM:]
                found.setdefault(f"sum by {kind}, {x.nbytes} B", []).extend(seconds)
    return found


def _seconds(sums: Collectives, x: torch.Tensor) -> float:
    began = time.perf_counter()
    sums.all_reduce(x)
    return time.perf_counter() - began


def _plans(line: Line, rounds: int) -> dict[str, float]:
    """A step's plan, to a rank that sends it back."""
    came: queue.SimpleQueue[Any] = queue.SimpleQueue()
    talk = Talk(line, came.put)
    talk.start({"drawn": lambda step, parts: came.put(parts)}, {})
    found: dict[str, list[float]] = {}
    for batch in BATCHES:
        packed = pack(plan_of(batch))
        for step in range(WARM + rounds):
            began = time.perf_counter()
            talk.tell("step", step, [packed])
            if came.get() != [packed]:
                raise SystemExit("a rank sent back another plan than it got, or is gone")
            found.setdefault(f"plan of {batch}, {len(packed)} B", []).append(time.perf_counter() - began)
    talk.close()
    return {key: statistics.median(seconds[WARM:]) for key, seconds in found.items()}


def plan_of(batch: int) -> StepPlan:
    """A decode step of sequences of 100 tokens."""
    draw = Draw(SamplingParams(), 1)
    return StepPlan(tuple(Piece(Ticket(f"r{n}", 0, 1), (5,), 99, tuple(range(7)), draw) for n in range(batch)))
