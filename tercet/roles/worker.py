"""One worker process: the model, the parts that serve its legs, and the ports. The controller starts and watches it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence

import torch

from tercet.core import Load, Role, WorkerInfo
from tercet.devices import DEVICES, device_of
from tercet.engine.loop import Engine
from tercet.errors import UnsupportedModel
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.models.footprint import refuse_too_large
from tercet.models.sources import load_config, load_model, load_vision
from tercet.placement.cores import refuse_missing_cores
from tercet.roles.computing import Computing
from tercet.roles.legs import Legs
from tercet.roles.part import Identity, Part
from tercet.spec import ClusterSpec
from tercet.wire.worker_server import WorkerServer

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
        self._parts: list[Part] = []

    async def start(self) -> WorkerInfo:
        """Load the model, open the ports (free ones on `host`). Raises ModelError, ClusterError, and
        UnsupportedSpec if the pool's accelerator is not here or too small."""
        who, spec, loop = self._who, self._who.role_spec, asyncio.get_running_loop()
        device = DEVICES[who.spec.pools[spec.pool].accelerator].torch_device()
        refuse_missing_cores(who.role, who.cores)
        kernels = await loop.run_in_executor(None, choose_kernels, spec.kernels, device)
        log.info("%s computes with kernels %s, threads: %d", who.worker_id, kernels, spec.threads)
        torch.set_num_threads(spec.threads)
        alone, row = {who.role: 1}, device_of(device)
        await loop.run_in_executor(None, refuse_too_large, who.spec, alone, row, row.memory_bytes())
        self.legs = Legs(loop)
        for part in await loop.run_in_executor(None, self._loaded, kernels):
            self._parts.append(part)
            await part.start()
        self._server = WorkerServer(self.legs, self.legs.load, who.token)
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
        return self.legs.load()

    async def drain(self, timeout_s: float) -> None:
        await self.legs.drain(timeout_s)

    async def stop(self) -> None:
        for part in self._parts:
            part.begin_stop()
        await self._server.stop()
        await self.legs.close()
        for part in self._parts:
            await part.stop()

    def _loaded(self, kernels: Kernels) -> list[Part]:
        """Reads the weights that its legs need. Raises ModelError, UnsupportedSpec."""
        who, model, parts = self._who, self._who.spec.model, list[Part]()
        kinds, vision = {*who.serves}, load_config(model).vision
        if kinds != {Role.ENCODE}:
            parts.append(Computing(who, self.legs, load_model(model, kernels), kernels))
        if vision is None and Role.ENCODE in who.spec.roles:
            raise UnsupportedModel(f"{model.source} takes no images, which topology {who.spec.topology} is for")
        if vision is None or kinds == {Role.DECODE}:
            return parts
        from tercet.roles.seeing import Encoding, Landing, Seeing  # they import Pillow, which others do without

        if Role.ENCODE in kinds:
            parts.append(Encoding(who, self.legs, load_vision(model, kernels), kernels))
        elif Role.ENCODE in who.spec.roles:
            parts.append(Landing(who, self.legs, vision))
        else:
            parts.append(Seeing(who, self.legs, load_vision(model, kernels), kernels))
        return parts

    def _endpoint(self) -> str:
        """Where the stage before this one sends what its legs need."""
        own = [handler.endpoint for handler in self.legs.handlers.values()]
        if self.legs.images is not None:
            own.append(self.legs.images.endpoint)
        return next(filter(None, own), "")
