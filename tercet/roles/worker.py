"""One worker process: the model, the parts that serve its legs, and the ports. The controller starts and watches it.

start ─────────> parts of its role, ports ──drain──> no legs ──stop──> closed
                             ^                          │
                             └── parts of another role ─┴─ switch: what it holds of the model is kept
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from tercet.core import Load, Loading, Role, WorkerInfo
from tercet.devices import DEVICES, device_of
from tercet.distributed.routed import Routed
from tercet.engine.loop import Engine
from tercet.errors import ClusterError, UnsupportedModel, WorkerLost
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.models.footprint import refuse_too_large
from tercet.models.loader import LoadedModel
from tercet.models.sources import load_config, load_model, load_vision
from tercet.placement.cores import refuse_missing_cores
from tercet.roles.computing import Computing
from tercet.roles.group import Group
from tercet.roles.legs import Legs
from tercet.roles.part import Identity, Part
from tercet.spec import ClusterSpec
from tercet.tracing import Tracing
from tercet.transfer.transports.table import in_device_memory
from tercet.wire.worker_server import WorkerServer

QUIET_S = 15.0  # for peers to prove that they write no more; longer than one that hangs is let live
LOOK_EVERY_S = 0.01

log = logging.getLogger(__name__)


class Worker:
    def __init__(
        self,
        worker_id: str,
        role: Role,
        epoch: int,
        spec: ClusterSpec,
        host: str,
        cluster_token: str,
        serves: Sequence[Role] = (),
        cores: Sequence[int] = (),
    ) -> None:
        """role: the spec's role that sizes it, and the one that it announces. serves: the kinds of legs; by default
        its role's. cores: what its compute threads are pinned to; none: any."""
        kinds = tuple(serves) or (role,)
        self._who = Identity(worker_id, role, epoch, spec, host, cluster_token, kinds, tuple(cores))
        self._spans = Tracing(spec, "worker", worker_id)
        self._parts: list[Part] = []
        self._group: Group | None = None  # of a worker of several ranks
        self.loading: Loading | None = None  # none before it begins to load; of several ranks, that of rank 0
        # By kernels, for which weights are packed; the last ones are kept over changes of role.
        self._text = lru_cache(maxsize=1)(lambda kernels: load_model(spec.model, kernels, hear=self._hear))
        self._vision = lru_cache(maxsize=1)(lambda kernels: load_vision(spec.model, kernels, self._hear))

    async def listen(self) -> str:
        """For a worker of several ranks, before `start`. -> the endpoint that the others join."""
        loop, worker_id = asyncio.get_running_loop(), self._who.worker_id

        def on_broken(error: WorkerLost) -> None:
            loop.call_soon_threadsafe(self.legs.die, error)

        self._group = Group(self._who, on_broken)
        log.info("%s waits for %d other ranks", worker_id, self._group.place.ranks - 1)
        return self._group.endpoint

    async def start(self) -> WorkerInfo:
        """Load the model, open the ports (free ones on `host`). Raises ModelError, ClusterError, and
        UnsupportedSpec if the pool's accelerator is not here or too small."""
        return await self._begin()

    async def switch(self, role: Role, epoch: int, cores: Sequence[int] = ()) -> WorkerInfo:
        """Serve in another role, as a new incarnation with other ports, once `drain` has returned.

        Raises WorkerLost if the memory of its KV cannot be given up before the process ends, and what `start` does.
        It then serves nothing, and is to end.
        """
        if self._group is not None:
            raise WorkerLost(f"{self._who.worker_id} has several ranks, which serve again as new processes only")
        await self._until_quiet()
        await self._end()
        self._who = replace(self._who, role=role, epoch=epoch, serves=(role,), cores=tuple(cores))
        return await self._begin()

    async def _begin(self) -> WorkerInfo:
        who, spec, loop = self._who, self._who.role_spec, asyncio.get_running_loop()
        device = DEVICES[who.spec.pools[spec.pool].accelerator].torch_device()
        refuse_missing_cores(who.role, who.cores)
        kernels = await loop.run_in_executor(None, choose_kernels, spec.kernels, device)
        log.info("%s computes with kernels %s, threads: %d", who.worker_id, kernels, spec.threads)
        torch.set_num_threads(spec.threads)
        alone, row = {who.role: 1}, device_of(device)
        if self._group is None or row.kind == "cpu":  # a device holds a rank's share, which is not known before
            await loop.run_in_executor(None, refuse_too_large, who.spec, alone, row, row.memory_bytes())
        self.legs = Legs(loop, self._spans)
        for part in await loop.run_in_executor(None, self._loaded, kernels):
            await part.start()
            self._parts.append(part)
        self._server = WorkerServer(self.legs, self.legs.load, who.token, who.tls)
        address = await self._server.start(who.host)
        return WorkerInfo(
            who.worker_id,
            who.role,
            who.epoch,
            address,
            self._endpoint(),
            next(part.fingerprint for part in self._parts if part.fingerprint),
            os.getpid(),
            socket.gethostname(),
            str(kernels),
        )

    @property
    def engine(self) -> Engine:
        assert self.legs.engine is not None, "an encode worker has none"
        return self.legs.engine

    async def health(self) -> Load:
        """Raises ClusterError when a part is dead or stuck, or the KV's memory is broken."""
        for part in self._parts:
            part.health()
        load = await asyncio.get_running_loop().run_in_executor(None, self._counted, self.legs.load())
        return replace(load, transfer_endpoint=self._endpoint())

    def _counted(self, load: Load) -> Load:
        for part in self._parts:
            load = part.counted(load)
        return load

    def lost_ranks(self) -> list[int]:
        """Of a worker of several: those that the others go on without."""
        losses = None if self._group is None else self._group.losses
        return [] if losses is None else sorted(losses.out)

    async def routed(self, *, pairs: bool = False) -> Routed:
        """What its ranks have counted of their routing; pairs: also which experts follow each other. Raises
        ClusterError."""
        counted = partial(self._computing().routed, pairs=pairs)
        return await asyncio.get_running_loop().run_in_executor(None, counted)

    async def move_experts(
        self,
        rows: Sequence[Sequence[int]],
        shares: Sequence[Sequence[Sequence[int]]] | None = None,
        *,
        shares_only: bool = False,
    ) -> tuple[int, int]:
        """As `Migration.start`; `health` tells how it goes. Raises ClusterError."""
        move = partial(self._computing().move_experts, rows, shares, shares_only=shares_only)
        return await asyncio.get_running_loop().run_in_executor(None, move)

    def _computing(self) -> Computing:
        """Raises ClusterError."""
        text = next((part for part in self._parts if isinstance(part, Computing)), None)
        if text is None:
            raise ClusterError(f"{self._who.worker_id} computes no text, or is just starting")
        return text

    async def drain(self, timeout_s: float) -> None:
        await self.legs.drain(timeout_s)

    async def stop(self) -> None:
        await self._end()
        await asyncio.get_running_loop().run_in_executor(None, self._spans.close)

    async def _until_quiet(self) -> None:
        """Return once no peer can write here any more, nor reads, and the gateway has parted. Raises WorkerLost."""
        worker_id, deadline = self._who.worker_id, time.monotonic() + QUIET_S
        if self.legs.engine is not None and in_device_memory(self._who.spec.transfer.transport):
            raise WorkerLost(f"{worker_id}: its KV is in memory of a GPU that ends with the process")
        while waits_for := self._noise():
            if time.monotonic() > deadline:
                raise WorkerLost(f"{worker_id}: {waits_for}, until the process ends")
            await asyncio.sleep(LOOK_EVERY_S)

    def _noise(self) -> str:
        load = self.legs.load()
        if load.blocks_free < load.blocks_total or load.embedding_blocks_free < load.embedding_blocks_total:
            return "peers may still write to its memory"
        return "the gateway may still wait for the ends of legs" if self._server.streams else ""

    async def _end(self) -> None:
        parts, self._parts = self._parts, []  # their health is of no interest any more
        if self._group is not None:
            self._group.begin_stop()
        for part in parts:
            part.begin_stop()
        await self._server.stop()
        await self.legs.close()
        for part in parts:
            await part.stop()
        self.legs.engine = None  # what still waits for its time on the loop refers to the legs, but not to its memory

    def _loaded(self, kernels: Kernels) -> list[Part]:
        """Reads the weights that its legs need. Raises ModelError, UnsupportedSpec."""
        who, model, parts = self._who, self._who.spec.model, list[Part]()
        kinds, vision = {*who.serves}, load_config(model).vision
        if self._group is not None:
            return [Computing(who, self.legs, self._share(self._group, kernels), kernels, self._group)]
        if kinds != {Role.ENCODE}:
            parts.append(Computing(who, self.legs, self._text(kernels), kernels))
        if vision is None and Role.ENCODE in who.spec.roles:
            raise UnsupportedModel(f"{model.source} takes no images, which topology {who.spec.topology} is for")
        if vision is None or kinds == {Role.DECODE}:
            return parts
        from tercet.roles.seeing import Encoding, Landing, Seeing  # they import Pillow, which others do without

        if Role.ENCODE in kinds:
            parts.append(Encoding(who, self.legs, self._vision(kernels), kernels))
        elif Role.ENCODE in who.spec.roles:
            parts.append(Landing(who, self.legs, vision))
        else:
            parts.append(Seeing(who, self.legs, self._vision(kernels), kernels))
        return parts

    def _share(self, group: Group, kernels: Kernels) -> LoadedModel:
        """Rank 0's of the model. Raises WorkerLost, ModelError."""
        if load_config(self._who.spec.model).vision is not None:
            raise UnsupportedModel(f"{self._who.spec.model.source}: no group of ranks runs a model that sees yet")
        return load_model(self._who.spec.model, kernels, group.meet(kernels), self._hear)

    def _hear(self, loading: Loading) -> None:
        self.loading = loading

    def _endpoint(self) -> str:
        """Where the stage before this one sends what its legs need."""
        own = [handler.endpoint for handler in self.legs.handlers.values()]
        if self.legs.images is not None:
            own.append(self.legs.images.endpoint)
        return next(filter(None, own), "")
