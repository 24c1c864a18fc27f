"""What a worker of text is made of: the model, its KV's memory, the engine on its thread, the handlers of its legs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from tercet.core import Load, Role
from tercet.devices import device_of
from tercet.distributed.place import Place
from tercet.distributed.routed import Routed
from tercet.distributed.talk import Talk
from tercet.engine.executor import Executor, LocalExecutor
from tercet.engine.graphs import CudaRecorder, default_sizes
from tercet.engine.group import GroupExecutor
from tercet.engine.loop import Engine
from tercet.engine.runner import Runner
from tercet.errors import ClusterError, UnsupportedSpec, WorkerDrained, WorkerLost
from tercet.kernels.kinds import Kernels
from tercet.models.loader import LoadedModel
from tercet.models.shard import kv_layout
from tercet.roles.aggregated import Aggregated
from tercet.roles.decode import Decode
from tercet.roles.expert_mover import ExpertMover
from tercet.roles.expert_rows import expert_rows
from tercet.roles.group import Group, place_of
from tercet.roles.joint import JointReceiver, JointSender, Receiver
from tercet.roles.legs import Handler, Legs
from tercet.roles.losses import Hooks
from tercet.roles.memory import region_of
from tercet.roles.migration import Migration
from tercet.roles.part import Identity, Part
from tercet.roles.peers import Sender
from tercet.roles.placed import agreed
from tercet.roles.prefill import Prefill
from tercet.roles.routed import own_counts, own_pairs, pair_layers, paired, routed
from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import MoverConfig, Transport
from tercet.transfer.transports.group_endpoint import GroupEndpoint, meets

STOP_S = 5.0  # for the last step to end
STUCK_S = 60.0  # a step that runs longer than any step should: the worker is unhealthy


class _Mover(NamedTuple):
    """The arguments that both sides of the mover share."""

    config: MoverConfig
    region: KvRegion
    transports: Sequence[Transport]


class Computing(Part):
    def __init__(
        self, who: Identity, legs: Legs, loaded: LoadedModel, kernels: Kernels, group: Group | None = None
    ) -> None:
        """group: of a worker of several ranks, of which this is rank 0."""
        self._who, self._legs, self._loaded, self._kernels, self._group = who, legs, loaded, kernels, group
        self.fingerprint = loaded.fingerprint
        self._computed: Callable[[], int] = lambda: 0

    async def start(self) -> None:
        """Raises SpecError, UnsupportedSpec."""
        loop, who, loaded = asyncio.get_running_loop(), self._who, self._loaded
        spec, transport = who.role_spec, who.spec.transfer.transport
        layout = loaded.model.kv_layout(spec.kv.blocks, spec.kv.block_size)
        self._region = await loop.run_in_executor(None, region_of, layout, transport, self._kernels, who.cores)
        mover = _Mover(who.mover_config(loaded.fingerprint), self._region, who.transports)
        handlers = [self._handler(kind, mover) for kind in who.serves]
        self._legs.handlers.update(zip(who.serves, handlers, strict=True))
        push = next((handler.push for handler in handlers if handler.push is not None), None)
        max_context = min(who.spec.model.max_context, loaded.config.max_context)
        self._runner = Runner(loaded.model, self._region, push)
        await loop.run_in_executor(None, self._capture, self._runner, max_context)
        executor = self._executor()
        if self._group is not None:
            await loop.run_in_executor(None, self._group.ready, agreed(loaded))
            self._tell_endpoint()
        self.engine = Engine(
            executor,
            spec,
            max_context,
            loaded.config.eos_token_ids,
            who.spec.transfer.quarantine_blocks,
            self._legs.on_step,
            mrope=bool(loaded.config.rope.sections),
            replicas=spec.parallelism.data,
        )
        self._legs.engine = self.engine
        if self._group is not None:
            hooks = Hooks(
                partial(self._wait, self._rank_out, self._group), partial(self._wait, self._rank_back, self._group)
            )
            self._group.survive(partial(agreed, loaded), hooks)
        self._computed = lambda: self.engine.computed
        self._thread = threading.Thread(target=self._run_engine, args=(loop,), name="engine", daemon=True)
        self._thread.start()

    def _executor(self) -> Executor:
        group = self._group
        if group is None:
            return LocalExecutor(self._runner)
        talks = list(group.talks.values())
        loaded = self._loaded
        group.executor = GroupExecutor(self._runner, group.place, talks, loaded.model.ranks.spread)
        if loaded.model.ranks.spread is not None:
            own = ExpertMover(self._who, 0, loaded.model, loaded.fingerprint)
            group.migration = Migration(group, own, group.executor, loaded.model, self._who.epoch)
        return group.executor

    def _tell_endpoint(self) -> None:
        """Where the receivers of all ranks are reached now, if KV comes to this worker."""
        assert self._group is not None
        place = self._group.place
        for handler in filter(lambda handler: handler.endpoint, self._legs.handlers.values()):
            own = GroupEndpoint.decode(handler.endpoint).ranks[0]
            ranks = own, *self._group.endpoints
            handler.endpoint = GroupEndpoint(place.tensor, place.pipeline, place.data, ranks).encode()

    def _wait(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """On a thread of the group: do it on the event loop, between two legs."""
        asyncio.run_coroutine_threadsafe(work(*args), self._legs.loop).result(STUCK_S)

    async def _rank_out(self, group: Group, rank: int, error: WorkerLost) -> None:
        self.engine.lose(group.place.of(rank).data_rank)
        for mover in group.movers:
            mover.lose(rank, WorkerDrained(str(error)))  # its requests can go on at once; this worker lives
        self._tell_endpoint()

    async def _rank_back(self, group: Group, talk: Talk) -> None:
        for mover in group.movers:
            mover.regain(talk)
        self.engine.restore(group.place.of(talk.rank).data_rank)
        self._tell_endpoint()

    def health(self) -> None:
        if self._group is not None and self._group.broken is not None:
            raise self._group.broken
        if self.engine.failure is not None or not self._thread.is_alive():
            raise ClusterError(f"the engine of {self._who.worker_id} died: {self.engine.failure!r}")
        if isinstance(self._region, DeviceRegion) and self._region.broken:
            raise ClusterError(f"{self._who.worker_id}: {self._region.broken}")
        started = self.engine.step_started
        if started is not None and time.monotonic() - started > STUCK_S:
            raise ClusterError(f"the engine of {self._who.worker_id} is stuck in one step for over {STUCK_S:g} s")

    def counted(self, load: Load) -> Load:
        own, group = expert_rows(self._loaded.model), self._group
        others = {} if group is None else group.experts
        moves = None if group is None or group.migration is None else group.migration.moves
        rows = [*([] if own is None else [own]), *(others[rank] for rank in sorted(others))]
        return replace(load, experts=tuple(rows), moves=moves)

    def routed(self, *, pairs: bool) -> Routed:
        model, group = self._loaded.model, self._group
        others = {} if group is None else group.routed()
        found = routed(model, self._who.spec.model.dtype, {0: own_counts(model), **others})
        executor = None if group is None else group.executor
        found = replace(found, steps=0 if executor is None else executor.steps)
        if not pairs:
            return found
        layers = partial(pair_layers, model)
        there = {} if group is None else group.pairs(layers)
        return replace(found, pairs=paired(model, {0: [own_pairs(model, layer) for layer in layers(0)], **there}))

    def move_experts(
        self,
        rows: Sequence[Sequence[int]],
        shares: Sequence[Sequence[Sequence[int]]] | None,
        *,
        shares_only: bool,
    ) -> tuple[int, int]:
        """As `Migration.start`. Raises ClusterError."""
        if self._group is None or self._group.migration is None:
            raise ClusterError(f"the experts of {self._who.worker_id} lie on one rank")
        return self._group.migration.start(rows, shares, shares_only=shares_only)

    def begin_stop(self) -> None:
        self.engine.stop()

    async def stop(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._thread.join, STOP_S)
        if self._group is not None:
            await loop.run_in_executor(None, self._group.close)
            self._group.leave()
        await loop.run_in_executor(None, self._runner.close)
        self._region.close()
        del self.engine, self._runner, self._region  # a sender that has ended may hold this part a moment longer

    def _progress(self) -> int:
        """It grows as long as prompts are computed, or images come that they wait for. Any thread."""
        return self._computed() + (0 if self._legs.images is None else self._legs.images.progress)

    def _handler(self, kind: Role, mover: _Mover) -> Handler:
        match kind:
            case Role.PREFILL:
                scheduler = self._who.role_spec.scheduler
                prefill = Prefill(self._legs, scheduler.max_running + scheduler.max_waiting)
                prefill.send_by(self._sender(mover, prefill))
                return prefill
            case Role.DECODE:
                decode = Decode(self._legs)
                decode.receiver, decode.endpoint = self._receiver(mover, decode)
                return decode
        return Aggregated(self._legs)

    def _sender(self, mover: _Mover, prefill: Prefill) -> Sender:
        if not self._meets_groups:
            return KvSender(*mover, prefill.on_event, self._progress)
        talks = [] if self._group is None else list(self._group.talks.values())
        joint = JointSender(
            lambda on_event: KvSender(*mover, on_event, self._progress),
            self._places(self._who.role),
            self._layouts(self._who.role),
            self._legs.loop,
            prefill.on_event,
            talks,
        )
        if self._group is not None:
            self._group.sender = joint
        return joint

    def _receiver(self, mover: _Mover, decode: Decode) -> tuple[Receiver, str]:
        """-> and the endpoint of this rank."""
        who, (config, region, transports) = self._who, mover
        if not self._meets_groups:
            alone = KvReceiver(config, who.epoch, region, transports, decode.on_event)
            return alone, alone.start(who.host).encode()
        senders, here = self._layouts(Role.PREFILL), self._layouts(who.role)
        theirs = [at.rank for at in self._places(Role.PREFILL) if at.data_rank == 0]  # each replica has as many
        sources = {rank: sum(meets(senders[src], dst) for src in theirs) for rank, dst in enumerate(here)}
        talks = [] if self._group is None else list(self._group.talks.values())
        joint = JointReceiver(
            lambda on_event: KvReceiver(config, who.epoch, region, transports, on_event),
            self._places(who.role),
            sources,
            self._legs.loop,
            decode.on_event,
            talks,
        )
        if self._group is not None:
            self._group.receiver = joint
        return joint, joint.start(who.host).encode()

    @property
    def _meets_groups(self) -> bool:
        """Whether KV goes from or to workers of several ranks."""
        return any(role.parallelism.ranks > 1 for role in self._who.spec.roles.values())

    def _layouts(self, role: Role) -> list[KvLayout]:
        """Of the ranks of a worker of this role."""
        kv, config, dtype = self._who.spec.roles[role].kv, self._loaded.config, self._region.layout.dtype
        return [kv_layout(config, place, kv.blocks, kv.block_size, dtype) for place in self._places(role)]

    def _places(self, role: Role) -> list[Place]:
        wanted = self._who.spec.roles[role].parallelism
        return [place_of(wanted, rank) for rank in range(wanted.ranks)]

    def _capture(self, runner: Runner, max_context: int) -> None:
        """Capture the decode steps that the spec asks for. Raises UnsupportedSpec if none can be, and it names some."""
        who, device = self._who, self._kernels.device
        wanted, can = who.role_spec.cuda_graphs, device_of(device).captures and runner.captures
        if not isinstance(wanted, str) and not can:
            asked = f"roles.{who.role}.cuda_graphs"
            raise UnsupportedSpec(
                f"{asked}: no step of this model can be captured with kernels {self._kernels}; use auto"
            )
        if wanted == "off" or not can or {*who.serves} == {Role.PREFILL} or self._group:  # the first decodes none
            return
        sizes = default_sizes(who.role_spec.scheduler.max_running) if isinstance(wanted, str) else {*wanted}
        title, console = f"{who.worker_id} captures decode steps", Console(stderr=True)
        runner.capture(track(sorted(sizes, reverse=True), title, console=console), max_context, CudaRecorder(device))

    def _run_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        self._who.prepare_thread(self._kernels)
        try:
            self.engine.run()
        finally:
            if self.engine.failure is not None:
                error = WorkerLost(f"the engine of {self._who.worker_id} died: {self.engine.failure!r}")
                loop.call_soon_threadsafe(self._legs.die, error)
                if self._group is not None:
                    self._group.fail(error)
