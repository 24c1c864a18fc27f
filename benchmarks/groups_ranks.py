"""A model that a group of ranks serves, each rank in a process of its own: the engine of rank 0, asked over a pipe.

benchmark ─(method, arguments)─> rank 0 ─steps─> the other ranks
          <─answer──────────────
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import statistics
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.engine import Driver, Workload
from tercet.core import Role
from tercet.distributed.ranks import Ranks
from tercet.engine.executor import Executor, LocalExecutor
from tercet.engine.group import GroupExecutor
from tercet.engine.runner import Runner
from tercet.kernels.kinds import choose_kernels
from tercet.models.sources import load_model
from tercet.roles.group import Group
from tercet.roles.measure import measured
from tercet.roles.memory import region_of
from tercet.roles.part import Identity
from tercet.roles.placed import agreed
from tercet.roles.rank import Rank
from tercet.spec import ClusterSpec

HOST, TOKEN = "127.0.0.1", "benchmark"
ANSWER_S = 120.0
SERVER = multiprocessing.get_context("forkserver")  # one process imports everything for all
FORK = multiprocessing.get_context("fork")  # of a process of that server that has no threads yet
SERVER.set_forkserver_preload(["benchmarks.groups_models", "benchmarks.groups_sums", "tercet.models.loader"])
DEGREES = re.compile(r"(tp|pp|ep)(\d+)")
NAMES = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
MOST_AT_ONCE = 32  # sequences of a replica
Traffic = dict[str, list[float]]  # kind of parallelism -> calls, bytes, seconds


@dataclass(frozen=True)
class Shape:
    """How many processes share the model, and how many threads each has."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1  # ranks, each with attention of its own (data = expert)
    threads: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.expert

    @classmethod
    def parse(cls, text: str, cores: int) -> Shape:
        """`one`, or degrees as in `tp2`, `pp2`, `tp2pp2`, `ep4`; as many threads in all as cores, but one at least.
        Raises SystemExit."""
        found = DEGREES.findall(text)
        degrees = {NAMES[name]: int(degree) for name, degree in found}
        if text != "one" and ("".join(a + b for a, b in found) != text or not found or 0 in degrees.values()):
            raise SystemExit(f"--shapes: {text!r} is neither `one` nor degrees such as tp2, pp2, tp2pp2, ep4")
        return cls(**degrees, threads=max(1, cores // cls(**degrees).ranks))

    def spec(self, source: str, dtype: str) -> ClusterSpec:
        """A worker of this shape."""
        parallelism = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.expert, "expert": self.expert}
        role = {"threads": self.threads, "parallelism": parallelism, "scheduler": {"max_running": MOST_AT_ONCE}}
        model = {"source": source, "dtype": dtype, "max_context": 2048}
        return ClusterSpec(topology="aggregated", model=model, roles={Role.AGGREGATED: role})


@dataclass(frozen=True)
class Run:
    """One `generate`."""

    step_s: float  # median of the steps between tokens; of one step, the whole
    steps: int
    wall_s: float  # from the start to the last token
    traffic: list[Traffic]  # of each rank, in this run


class Served:
    """Rank 0's process, as the benchmark sees it."""

    def __init__(self, source: str, shape: Shape, dtype: str) -> None:
        """Starts all ranks; the first answer waits for them."""
        self._pipe, theirs = SERVER.Pipe()
        self._process = SERVER.Process(target=_serve, args=(theirs, shape.spec(source, dtype)))
        self._process.start()
        theirs.close()

    def ask(self, method: str, *args: Any) -> Any:
        """Of `_Rank0`. Raises SystemExit if it has died or is silent."""
        try:
            self._pipe.send((method, args))
            if self._pipe.poll(ANSWER_S):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise SystemExit(f"rank 0 has died; what it wrote says why ({error!r})") from error
        raise SystemExit(f"rank 0 did not answer {method} in {ANSWER_S:g} s")

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, spec: ClusterSpec) -> None:
    """Rank 0's process."""
    rank_0 = _Rank0(spec)
    try:
        while True:
            method, args = pipe.recv()
            pipe.send(getattr(rank_0, method)(*args))
    except EOFError:
        pass
    finally:
        rank_0.stop()


class _Rank0(Driver):
    def __init__(self, spec: ClusterSpec) -> None:
        self._who = Identity("group", Role.AGGREGATED, 1, spec, HOST, TOKEN, (Role.AGGREGATED,), ())
        role = self._who.role_spec
        self._group, self._others = self._begun(role.parallelism.ranks)
        self._bare = measured(Ranks())["private_bytes"]
        kernels = choose_kernels()
        kernels.set_threads(role.threads)
        self._ranks = Ranks() if self._group is None else self._group.meet(kernels)
        loaded = load_model(spec.model, kernels, self._ranks)
        layout = loaded.model.kv_layout(role.kv.blocks, role.kv.block_size)
        region = region_of(layout, spec.transfer.transport, kernels, ())
        executor = self._executor(Runner(loaded.model, region), agreed(loaded))
        super().__init__(executor, role, loaded.config)

    def _begun(self, ranks: int) -> tuple[Group | None, list[BaseProcess]]:
        """Where the other ranks are to join, and their processes."""
        if ranks == 1:
            return None, []
        group = Group(self._who, lambda _: None)  # the executor fails, and with it the engine
        arguments = [(self._who, number, group.endpoint) for number in range(1, ranks)]
        others: list[BaseProcess] = [FORK.Process(target=_other, args=each, daemon=True) for each in arguments]
        for process in others:
            process.start()
        return group, others

    def _executor(self, runner: Runner, ours: str) -> Executor:
        if self._group is None:
            return LocalExecutor(runner)
        talks = list(self._group.talks.values())
        self._group.executor = GroupExecutor(runner, self._group.place, talks, self._ranks.spread)
        self._group.ready(ours)
        return self._group.executor

    def run(self, work: Workload, seed: int) -> Run:
        before = self.measure()
        outcome = self.generate(work.prompts(self.config.vocab_size, seed), work.outputs)
        after = self.measure()
        gaps = [end - start for start, end in zip(self.stamps, self.stamps[1:], strict=False)]
        traffic = [difference(now["traffic"], then["traffic"]) for now, then in zip(after, before, strict=True)]
        return Run(statistics.median(gaps or [outcome.first_s]), len(self.stamps), outcome.total_s, traffic)

    def measure(self) -> list[dict[str, Any]]:
        """Of each rank."""
        talks = [] if self._group is None else self._group.talks.values()
        return [measured(self._ranks), *(talk.ask("measure", timeout_s=ANSWER_S) for talk in talks)]

    def bare(self) -> int:
        """Private bytes of a process like a rank's before it loads anything."""
        return self._bare

    def stop(self) -> None:
        super().stop()
        if self._group is not None:
            self._group.close()
        for process in self._others:
            process.terminate()
            process.join()


def difference(now: Traffic, then: Traffic) -> Traffic:
    return {kind: [a - b for a, b in zip(now[kind], then[kind], strict=True)] for kind in now}


def _other(who: Identity, number: int, endpoint: str) -> None:
    """The process of rank 1, 2 ...; it ends with rank 0."""
    rank = Rank(who.worker_id, number, who.role, who.epoch, who.spec, who.host, who.token, (), lambda _: os._exit(1))
    asyncio.run(rank.start(endpoint))
    threading.Event().wait()
