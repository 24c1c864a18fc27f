"""The other ranks of a worker, as its rank 0 has them: they join, load their shares, run its steps, and live and die
with it.

    listen ─> meet: every rank has joined, and they can sum ─> ready: every rank has loaded ─> steps ─> close
                                                                     any rank dies ─> broken: the worker is dead
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import torch

from tercet.core import ExpertRows
from tercet.distributed import meeting as exchange_group
from tercet.distributed.line import Line, Rendezvous, disposed_on_error
from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.distributed.setup import Setup, Venue, new_store, shared_memory
from tercet.distributed.talk import Talk
from tercet.engine.group import GroupExecutor
from tercet.errors import PeerMismatch, WorkerLost
from tercet.kernels.kinds import Kernels
from tercet.models.sources import load_config
from tercet.roles.joint import JointReceiver, JointSender
from tercet.roles.losses import Hooks, Losses
from tercet.roles.migration import Migration
from tercet.roles.part import Identity
from tercet.roles.placed import placed_experts
from tercet.roles.routed import OwnCounts
from tercet.spec import ParallelSpec

COLLECTIVE_S = 60.0  # as long as a step may take; a rank that dies is noticed at once, one that is stopped by its talk
HERE_S = 10.0  # after it has joined, for a rank to say where its exchange listens
log = logging.getLogger(__name__)


def place_of(wanted: ParallelSpec, rank: int = 0) -> Place:
    return Place(rank, wanted.tensor, wanted.pipeline, wanted.data, wanted.expert)


def setup_of(who: Identity, rank: int, device: torch.device) -> Setup:
    """Of a rank of this worker. Raises ModelError, UnsupportedSpec."""
    wanted = who.role_spec.parallelism
    place = place_of(wanted, rank)
    experts = placed_experts(wanted, load_config(who.spec.model))
    name = f"{who.worker_id} {who.epoch} stage {place.stage}"
    exchange = exchange_group.Group(name, who.token, wanted.expert, experts.slots_per_rank if experts else 0)
    return Setup(place, who.host, device, COLLECTIVE_S, experts, exchange)


class Group:
    def __init__(self, who: Identity, on_broken: Callable[[WorkerLost], None]) -> None:
        """on_broken: called once, on any thread."""
        self._who, self._on_broken = who, on_broken
        self.place = place_of(who.role_spec.parallelism)
        self._rendezvous = Rendezvous(who.host, who.token)
        self.talks: dict[int, Talk] = {}  # rank -> of those that take part
        self.broken: WorkerLost | None = None
        self._closing = False
        self.experts: dict[int, ExpertRows] = {}  # rank 1, 2 ... -> what it has computed, if it has experts
        self._ready: dict[int, tuple[str, str]] = {}  # rank -> (endpoint, what it has agreed to)
        self._gone: set[int] = set()  # ranks that ended while they came back
        self._changed = threading.Condition()
        self.executor: GroupExecutor | None = None
        self.sender: JointSender | None = None
        self.receiver: JointReceiver | None = None
        self.losses: Losses | None = None
        self.migration: Migration | None = None  # of experts
        self.placing = threading.Lock()
        self._ranks: Ranks | None = None

    @property
    def endpoint(self) -> str:
        """Where the other ranks join."""
        return self._rendezvous.endpoint

    # ---- blocking, on a pool thread

    def meet(self, kernels: Kernels) -> Ranks:
        """Waits for every rank. Raises WorkerLost."""
        deadline = time.monotonic() + self._who.spec.ray.start_timeout_s
        lines = self._rendezvous.joined(range(1, self.place.ranks), deadline, lambda: self._closing)
        with disposed_on_error(lines.values()), contextlib.ExitStack() as on_error:
            setup = setup_of(self._who, 0, kernels.device)
            venue = self._venue = self._venue_of(setup, lines, kernels)
            memory = shared_memory(self.place, venue)
            if memory is not None:
                on_error.callback(os.close, memory)
            for rank, line in sorted(lines.items()):
                line.send("setup", *astuple(venue), memory is not None)
                if memory is not None and rank in venue.together:
                    line.send_fd(memory)
                line.send("placed", 0, b"", [])
            on_error.pop_all()
        self.talks = {rank: self._talk(line) for rank, line in sorted(lines.items())}
        self._ranks = setup.ranks(venue, memory)
        return self._ranks

    def _venue_of(self, setup: Setup, lines: Mapping[int, Line], kernels: Kernels) -> Venue:
        self._store = new_store(self._who.host)
        local = (0, *(rank for rank, line in lines.items() if line.is_local)) if kernels.native else ()
        exchanges = [setup.exchange]
        for rank in sorted(lines):
            lines[rank].set_deadline(time.monotonic() + HERE_S)
            match lines[rank].receive():
                case ["here", str(exchange)]:
                    exchanges.append(exchange)
                case other:
                    raise WorkerLost(f"rank {rank} said {other!r:.80} where it should say that it is here")
            lines[rank].set_deadline(None)
        cores = len(os.sched_getaffinity(0))
        return Venue(f"{self._who.host}:{self._store.port}", local, cores, tuple(exchanges))

    def ready(self, agreed: str) -> None:
        """Waits until every rank has loaded its share. Raises WorkerLost, or PeerMismatch for one of another model."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken is not None or self._ready.keys() == self.talks.keys())
            if self.broken is not None:
                raise self.broken
        for rank, (_, theirs) in sorted(self._ready.items()):
            if theirs != agreed:
                told = f"({theirs:.12}) than rank 0 ({agreed:.12}), or another expert_plan"
                raise PeerMismatch(f"rank {rank} has other weights {told}")

    @property
    def endpoints(self) -> list[str]:
        """Of the receivers of ranks 1, 2 ..., once ready; empty for one that is lost."""
        return [self._ready[rank][0] if rank in self.talks else "" for rank in range(1, self.place.ranks)]

    # ---- ranks that are lost and come back

    def survive(self, agreed: Callable[[], str], hooks: Hooks) -> None:
        """From now on go on without a rank that is lost, where that is possible, and take it back. agreed: as
        `Losses.start`."""
        place, spread = self.place, None if self._ranks is None else self._ranks.spread
        alone = place.tensor == place.pipeline == 1  # else other ranks compute the same requests
        if spread is None or not alone:
            self._rendezvous.close()
            return
        self.losses = Losses(self, self._engine(), spread, self._rendezvous, self._who.spec.ray.start_timeout_s)
        self.losses.start(hooks, agreed)

    def welcome(self, line: Line) -> tuple[Talk, str]:
        with disposed_on_error([line]):
            line.set_deadline(time.monotonic() + HERE_S)
            match line.receive():
                case ["here", str(exchange)]:
                    line.set_deadline(None)
                    self._ready.pop(line.rank, None)
                    self._gone.discard(line.rank)
                    line.send("setup", *astuple(Venue(self._venue.store, (), self._venue.cores, ())), False)
                    line.send("placed", *self._placed())
                    return self._talk(line), exchange
            raise WorkerLost(f"rank {line.rank} did not say that it is here")

    def _placed(self) -> tuple[int, bytes, list[tuple[int, list[list[int]]]]]:
        """The epoch of the placement of experts, phy2log of all layers, and the shares of those that have any. Empty if
        no experts are spread."""
        spread = None if self._ranks is None else self._ranks.spread
        if spread is None:
            return 0, b"", []
        placed = spread.map
        return spread.epoch, placed.phy2log.contiguous().numpy().tobytes(), [*placed.told_shares().items()]

    def until_ready(self, rank: int, timeout_s: float) -> str:
        with self._changed:
            self._changed.wait_for(
                lambda: rank in self._ready or rank in self._gone or self.broken or self._closing, timeout_s
            )
            if rank not in self._ready:
                raise WorkerLost(f"rank {rank} did not load its share")
            return self._ready[rank][1]

    def routed(self) -> dict[int, OwnCounts]:
        """Of ranks 1, 2 ... that are there, what each has counted."""
        found = {}
        for rank, talk in list(self.talks.items()):
            with contextlib.suppress(WorkerLost):  # it is lost meanwhile
                found[rank] = talk.ask("routed", timeout_s=HERE_S)
        return found

    def pairs(self, layers: Callable[[int], range]) -> dict[int, list[bytes]]:
        """Likewise, the pairs of each of its `layers`."""
        found = {}
        for rank, talk in list(self.talks.items()):
            with contextlib.suppress(WorkerLost):
                found[rank] = [talk.ask("pairs", layer, timeout_s=HERE_S) for layer in layers(rank)]
        return found

    def begin_stop(self) -> None:
        """The end of a rank is no fault any more, and nobody waits for one."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        self.begin_stop()
        if self.migration is not None:
            self.migration.close()
        if self.losses is not None:
            self.losses.close()
        self._rendezvous.close()
        for talk in list(self.talks.values()):
            talk.tell("stop")
            talk.close()
        if self._ranks is not None:
            self._ranks.stop()  # a rank may wait for one that is gone

    def fail(self, error: WorkerLost) -> None:
        """Rank 0 cannot go on. Any thread."""
        self._lost(error)

    def leave(self) -> None:
        """After `close`, once no step runs."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
            del self._store

    # ---- what ranks tell

    def _talk(self, line: Line) -> Talk:
        rank = line.rank
        talk = Talk(line, lambda error: self._lost(error, rank))
        told: dict[str, Callable[..., Any]] = {
            "ready": lambda endpoint, agreed: self._is_ready(rank, endpoint, agreed),
            "drawn": lambda number, attempt, results: self._engine().take(rank, number, attempt, results),
            "broken_off": lambda why, *which: self._engine().broken_off(why, *which),
            "failed": lambda why: self._lost(WorkerLost(why)),
            "sent": lambda fact: self._sender().take(rank, fact),
            "landed": lambda fact: self._receiver().take(rank, fact),
            "counts": lambda counts: self._count(rank, counts),
            "experts": lambda *rows: self._count_rows(rank, *rows),
        }
        talk.start(told, {})
        return talk

    def _engine(self) -> GroupExecutor:
        assert self.executor is not None, "a rank draws only what it was told to"
        return self.executor

    @property
    def movers(self) -> list[JointSender | JointReceiver]:
        return [mover for mover in (self.sender, self.receiver) if mover is not None]

    def _sender(self) -> JointSender:
        assert self.sender is not None, "a rank sends only what it was told to"
        return self.sender

    def _receiver(self) -> JointReceiver:
        assert self.receiver is not None, "a rank gets only what it was told to"
        return self.receiver

    def _is_ready(self, rank: int, endpoint: str, agreed: str) -> None:
        with self._changed:
            self._ready[rank] = endpoint, agreed
            self._changed.notify_all()

    def _count(self, rank: int, counts: dict[str, int]) -> None:
        for mover in self.movers:
            mover.counts[rank] = counts

    def _count_rows(self, rank: int, experts: list[int], rows: list[int], routed: list[int], sent: list[int]) -> None:
        self.experts[rank] = ExpertRows(rank, tuple(experts), tuple(rows), tuple(routed), tuple(sent))

    def _goes_on_without(self, rank: int, error: WorkerLost) -> bool:
        assert self.losses is not None
        if rank in self.talks:
            return self.losses.lose(rank, error)
        self._gone.add(rank)  # it was coming back
        self._changed.notify_all()
        return True

    def _lost(self, error: WorkerLost, rank: int | None = None) -> None:
        """rank: None: it is not known who is to blame."""
        with self._changed:
            if self.broken is not None:
                return
            if self._closing:
                self._break_off(error)
                return
            if rank is not None and self.losses is not None and self._goes_on_without(rank, error):
                return
            self.broken = WorkerLost(f"{self._who.worker_id}: {error}")
            self._changed.notify_all()
        log.error("%s", self.broken)
        self._on_broken(self.broken)  # before the engine ends: legs hear of the cause
        self._break_off(self.broken)

    def _break_off(self, error: WorkerLost) -> None:
        """Nobody here waits for another rank any more."""
        if self._ranks is not None:
            self._ranks.stop()
        if self.executor is not None:
            self.executor.fail(error)
