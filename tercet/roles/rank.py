"""Rank 1, 2 ... of a worker, a process that only its rank 0 talks to: it loads a share of the model, runs the steps
that rank 0 sends, and moves the KV of its share.

    join ─> setup: it can sum with the others ─> load ─> ready ─> steps ─> stop
                                                                    rank 0 is gone ─> on_end: it has nothing to live for
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tercet.core import Role, Ticket
from tercet.devices import DEVICES
from tercet.distributed.line import Line, disposed_on_error, join
from tercet.distributed.setup import Setup, Venue
from tercet.distributed.talk import Talk
from tercet.engine.rank_steps import RankSteps
from tercet.engine.runner import Runner
from tercet.errors import WorkerLost, from_wire
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.models.loader import LoadedModel
from tercet.models.sources import load_model
from tercet.placement.cores import refuse_missing_cores
from tercet.roles.expert_mover import MOVES, ExpertMover
from tercet.roles.expert_rows import expert_rows
from tercet.roles.facts_wire import packed_fact
from tercet.roles.group import setup_of
from tercet.roles.measure import measured
from tercet.roles.memory import region_of
from tercet.roles.part import Identity
from tercet.roles.placed import agreed
from tercet.roles.routed import own_counts, own_pairs
from tercet.spec import ClusterSpec
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender

COUNT_EVERY_S = 1.0
STOP_S = 5.0  # for a step to end
log = logging.getLogger(__name__)


class Rank:
    def __init__(
        self,
        worker_id: str,
        rank: int,
        role: Role,
        epoch: int,
        spec: ClusterSpec,
        host: str,
        cluster_token: str,
        cores: Sequence[int],
        on_end: Callable[[WorkerLost], None],
    ) -> None:
        """on_end: called on any thread when rank 0 is gone, after which this process is to end."""
        self._who = Identity(worker_id, role, epoch, spec, host, cluster_token, (role,), tuple(cores))
        self._rank, self._on_end = rank, on_end
        self._stopped = threading.Event()
        self._sender: KvSender | None = None
        self._receiver: KvReceiver | None = None
        self._experts: ExpertMover | None = None
        self._running: threading.Thread | None = None  # what computes, once it serves

    async def start(self, endpoint: str) -> None:
        """Returns when it has joined rank 0 there and loaded its share. Raises ModelError, SpecError, WorkerLost."""
        await asyncio.get_running_loop().run_in_executor(None, self._start, endpoint)

    async def stop(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._stop)

    # ---- start

    def _start(self, endpoint: str) -> None:
        who, spec = self._who, self._who.role_spec
        device = DEVICES[who.spec.pools[spec.pool].accelerator].torch_device()
        refuse_missing_cores(who.role, who.cores)
        kernels = choose_kernels(spec.kernels, device)
        torch.set_num_threads(spec.threads)
        line = join(endpoint, self._rank, who.token, who.spec.ray.start_timeout_s)
        with disposed_on_error([line]):
            setup = setup_of(who, self._rank, device)
            line.send("here", setup.exchange)
            venue, memory = self._venue(line)
            self._place_anew(line, setup)
        self._place = setup.place
        self._talk = Talk(line, self._ended)
        self._talk.start(self._told(), self._asked())
        self._ranks = setup.ranks(venue, memory)
        loaded = load_model(who.spec.model, kernels, self._ranks)
        moving = self._load(loaded, kernels)
        self._running = threading.Thread(target=self._run, args=(kernels,), name="rank-steps", daemon=True)
        self._running.start()
        threading.Thread(target=self._tell_counts, name="rank-counts", daemon=True).start()
        self._talk.tell("ready", moving, agreed(loaded))

    def _venue(self, line: Line) -> tuple[Venue, int | None]:
        line.settimeout(self._who.spec.ray.start_timeout_s)  # until the others have joined
        match line.receive():
            case ["setup", str(store), [*together], int(cores), [*exchanges], bool(shares)]:
                venue = Venue(store, tuple(together), cores, tuple(exchanges))
                return venue, line.receive_fd() if shares and self._rank in together else None
        raise WorkerLost("rank 0 sent no setup")

    def _place_anew(self, line: Line, setup: Setup) -> None:
        match line.receive():
            case ["placed", int(epoch), bytes(rows), [*shares]]:
                if rows:
                    setup.place_anew(epoch, rows, dict(shares))
                return
        raise WorkerLost("rank 0 did not say where experts lie")

    def _load(self, loaded: LoadedModel, kernels: Kernels) -> str:
        """-> the endpoint of its receiver, if KV comes to it."""
        who, spec = self._who, self._who.role_spec
        layout = loaded.model.kv_layout(spec.kv.blocks, spec.kv.block_size)
        transport, endpoint = who.spec.transfer.transport, ""
        self._region = region_of(layout, transport, kernels, who.cores)
        config, usables = who.mover_config(loaded.fingerprint), who.transports
        if who.role is Role.PREFILL:
            self._sender = KvSender(config, self._region, usables, self._tell_sent, self._computed)
        elif who.role is Role.DECODE:
            self._receiver = KvReceiver(config, who.epoch, self._region, usables, self._tell_landed)
            endpoint = self._receiver.start(who.host).encode()
        self._model = loaded.model
        if self._ranks.spread is not None:
            self._experts = ExpertMover(who, self._rank, loaded.model, loaded.fingerprint)
        self._runner = Runner(loaded.model, self._region, None if self._sender is None else self._sender.push)
        self._steps = RankSteps(self._runner, self._place, self._talk, self._ranks.spread)
        return endpoint

    def _run(self, kernels: Kernels) -> None:
        self._who.prepare_thread(kernels)
        self._steps.run()

    def _computed(self) -> int:
        return self._runner.layers_done

    # ---- what rank 0 tells and asks

    def _told(self) -> dict[str, Callable[..., Any]]:
        return {
            "step": self._step,
            "without": self._without,
            "rejoin": self._rejoin,
            "join": self._join,
            "experts_commit": self._commit,
            "finish": lambda ticket, note: self._sending().finish(Ticket(*ticket), note),
            "stop_sending": lambda ticket, error: self._sending().cancel(Ticket(*ticket), from_wire(*error)),
            "admit": lambda ticket, *leased: self._receiving().admit(Ticket(*ticket), *leased),
            "refuse": lambda ticket, reason: self._receiving().refuse(Ticket(*ticket), reason),
            "stop_receiving": lambda ticket, error: self._receiving().cancel(Ticket(*ticket), from_wire(*error)),
            "stop": self._stopped.set,
        }

    def _asked(self) -> dict[str, Callable[..., Any]]:
        return {
            "open": self._open,
            "connect": self._connect,
            "measure": self._measure,
            "routed": lambda: own_counts(self._model),  # only behind `ready`
            "pairs": lambda layer: own_pairs(self._model, layer),
            **{f"experts_{verb}": partial(self._move, verb) for verb in MOVES},
        }

    def _step(self, number: int, attempt: int, parts: list[bytes]) -> None:
        self._steps.take(number, attempt, parts)

    def _without(self, rank: int, attempt: int) -> None:
        self._steps.without(rank, attempt)

    def _rejoin(self, rank: int, endpoint: str, attempt: int) -> None:
        self._steps.rejoin(rank, endpoint, attempt)

    def _join(self, ranks: list[int], attempt: int) -> None:
        self._steps.join(ranks, attempt)

    def _move(self, verb: str, *fields: Any) -> Any:
        return self._moving().do(verb, *fields)

    def _commit(self, move: int, layer: int, epoch: int) -> None:
        self._steps.between(self._moving().commit(move, layer, epoch))

    def _moving(self) -> ExpertMover:
        assert self._experts is not None, "its experts are not spread"
        return self._experts

    def _sending(self) -> KvSender:
        assert self._sender is not None, "not a prefill worker"
        return self._sender

    def _receiving(self) -> KvReceiver:
        assert self._receiver is not None, "not a decode worker"
        return self._receiver

    def _open(self, ticket: list[Any], endpoints: list[str], num_tokens: int, left_s: float) -> str:
        return self._sending().open(Ticket(*ticket), endpoints, num_tokens, time.monotonic() + left_s)

    def _connect(self, endpoints: list[str]) -> None:
        for endpoint in endpoints:
            self._sending().connect(endpoint)

    def _measure(self) -> dict[str, Any]:
        """Only behind `ready`."""
        return measured(self._ranks)

    # ---- what rank 0 is told

    def _tell_sent(self, event: Any) -> None:
        self._talk.tell("sent", packed_fact(event))

    def _tell_landed(self, event: Any) -> None:
        self._talk.tell("landed", packed_fact(event))

    def _tell_counts(self) -> None:
        while not self._stopped.wait(COUNT_EVERY_S):
            self._talk.tell("counts", self._counts())
            if (rows := expert_rows(self._model)) is not None:
                self._talk.tell("experts", rows.experts, rows.rows, rows.routed, rows.sent_to)

    def _counts(self) -> dict[str, int]:
        counts = {}
        if self._sender is not None:
            counts["send_dropped"] = self._sender.dropped().total()
        if self._receiver is not None:
            counts |= {
                "receive_dropped": self._receiver.dropped().total(),
                "receive_refused": self._receiver.refused().total(),
                "corrupt": self._receiver.corrupt(),
            }
        return counts

    # ---- ends

    def _ended(self, error: WorkerLost) -> None:
        if self._stopped.is_set():
            return
        log.error("%s rank %d: %s", self._who.worker_id, self._rank, error)
        self._on_end(error)

    def _stop(self) -> None:
        self._stopped.set()
        for mover in (self._sender, self._receiver):
            if mover is not None:
                mover.stop()
        if self._experts is not None:
            self._experts.close()
        if self._running is None:
            return  # it never served, and ends with its process
        self._steps.stop()
        self._talk.close()
        self._ranks.stop()
        self._running.join(STOP_S)
        if not self._running.is_alive():  # else it waits for a rank that is gone, and ends with the process
            self._ranks.close()
            self._runner.close()
            self._region.close()
