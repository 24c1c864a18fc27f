"""One worker process: the model, the engine on its thread, the handlers of its legs, and the ports. The controller
starts and watches it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from tercet.core import Load, Role, WorkerInfo
from tercet.devices import DEVICES, device_of
from tercet.engine.executor import LocalExecutor
from tercet.engine.graphs import CudaRecorder, default_sizes
from tercet.engine.loop import Engine
from tercet.engine.runner import Runner
from tercet.errors import ClusterError, UnsupportedSpec, WorkerLost
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.models.footprint import refuse_too_large
from tercet.models.sources import load_model
from tercet.placement.cores import refuse_missing_cores
from tercet.roles.aggregated import Aggregated
from tercet.roles.decode import Decode
from tercet.roles.legs import Handler, Legs
from tercet.roles.prefill import Prefill
from tercet.spec import ClusterSpec
from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import MoverConfig, Transport
from tercet.transfer.transports.table import in_device_memory, usable
from tercet.wire.worker_server import WorkerServer

log = logging.getLogger(__name__)
STUCK_S = 60.0  # a step that runs longer than any step should: the worker is unhealthy


class _Mover(NamedTuple):
    """The arguments that both sides of the mover share."""

    config: MoverConfig
    region: KvRegion
    transports: Sequence[Transport]


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
        self._worker_id = worker_id
        self._role = role
        self._epoch = epoch
        self._spec = spec
        self._host = host
        self._token = cluster_token
        self._serves = serves or (role,)
        self._cores = cores

    async def start(self) -> WorkerInfo:
        """Load the model, open the ports (free ones on `host`). Raises ModelError, ClusterError, and
        UnsupportedSpec if the pool's accelerator is not here or too small."""
        loop = asyncio.get_running_loop()
        spec = self._spec.roles[self._role]
        device = DEVICES[self._spec.pools[spec.pool].accelerator].torch_device()
        refuse_missing_cores(self._role, self._cores)
        kernels = self._kernels = await loop.run_in_executor(None, choose_kernels, spec.kernels, device)
        log.info("%s computes with kernels %s, threads: %d", self._worker_id, kernels, spec.threads)
        torch.set_num_threads(spec.threads)
        alone, row = {self._role: 1}, device_of(device)
        await loop.run_in_executor(None, refuse_too_large, self._spec, alone, row, row.memory_bytes())
        loaded = await loop.run_in_executor(None, load_model, self._spec.model, kernels)
        layout = loaded.model.kv_layout(spec.kv.blocks, spec.kv.block_size)
        transport = self._spec.transfer.transport
        region = self._region = await loop.run_in_executor(None, _region_of, layout, transport, kernels, self._cores)
        self.legs = Legs(loop)
        if loaded.config.vision is not None and {*self._serves} != {Role.DECODE}:
            from tercet.roles.encode import encoder_of  # it imports Pillow, which a model that reads only does without

            self.legs.encoder = await loop.run_in_executor(None, encoder_of, self._spec.model, kernels)
        mover = _Mover(self._mover_config(loaded.fingerprint), region, usable(transport))
        handlers = [self._makers()[kind](mover) for kind in self._serves]
        self.legs.handlers.update(zip(self._serves, handlers, strict=True))
        push = next((handler.push for handler in handlers if handler.push is not None), None)
        max_context = min(self._spec.model.max_context, loaded.config.max_context)
        runner = Runner(loaded.model, region, push)
        await loop.run_in_executor(None, self._capture, runner, max_context)
        self.engine = Engine(
            LocalExecutor(runner),
            spec,
            max_context,
            loaded.config.eos_token_ids,
            self._spec.transfer.quarantine_blocks,
            self.legs.on_step,
            mrope=bool(loaded.config.rope.sections),
        )
        self.legs.engine = self.engine
        self._thread = threading.Thread(target=self._run_engine, args=(loop,), name="engine", daemon=True)
        self._thread.start()
        self._server = WorkerServer(self.legs, self.legs.load, self._token)
        address = await self._server.start(self._host)
        return WorkerInfo(
            self._worker_id,
            self._role,
            self._epoch,
            address,
            next((handler.endpoint for handler in handlers if handler.endpoint), ""),
            loaded.fingerprint,
            os.getpid(),
            socket.gethostname(),
            str(kernels),
        )

    def _capture(self, runner: Runner, max_context: int) -> None:
        """Capture the decode steps that the spec asks for. Raises UnsupportedSpec if none can be, and it names some."""
        spec, device = self._spec.roles[self._role], self._kernels.device
        wanted, can = spec.cuda_graphs, device_of(device).captures and self._kernels.kind == "triton"
        if not isinstance(wanted, str) and not can:
            asked = f"roles.{self._role}.cuda_graphs"
            raise UnsupportedSpec(f"{asked}: no step can be captured with kernels {self._kernels}; use auto")
        if wanted == "off" or not can or {*self._serves} == {Role.PREFILL}:  # which decodes none
            return
        sizes = default_sizes(spec.scheduler.max_running) if isinstance(wanted, str) else {*wanted}
        title, console = f"{self._worker_id} captures decode steps", Console(stderr=True)
        runner.capture(track(sorted(sizes, reverse=True), title, console=console), max_context, CudaRecorder(device))

    def _mover_config(self, fingerprint: str) -> MoverConfig:
        transfer = self._spec.transfer
        return MoverConfig(
            self._worker_id,
            fingerprint,
            self._token,
            transfer.lease_s,
            transfer.heartbeat_s,
            transfer.integrity,
            transfer.links,
        )

    def _makers(self) -> dict[Role, Callable[[_Mover], Handler]]:
        return {
            Role.PREFILL: self._make_prefill,
            Role.DECODE: self._make_decode,
            Role.AGGREGATED: lambda _: Aggregated(self.legs),
        }

    def _make_prefill(self, mover: _Mover) -> Handler:
        scheduler = self._spec.roles[self._role].scheduler
        handler = Prefill(self.legs, scheduler.max_running + scheduler.max_waiting)
        handler.sender = KvSender(*mover, handler.on_event, lambda: self.engine.computed)
        handler.push = handler.sender.push
        return handler

    def _make_decode(self, mover: _Mover) -> Handler:
        handler = Decode(self.legs)
        handler.receiver = KvReceiver(mover.config, self._epoch, mover.region, mover.transports, handler.on_event)
        handler.endpoint = handler.receiver.start(self._host).encode()
        return handler

    def _run_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)  # of this thread, and of those that it starts
        self._kernels.set_threads(self._spec.roles[self._role].threads)
        try:
            self.engine.run()
        finally:
            if self.engine.failure is not None:
                error = WorkerLost(f"the engine of {self._worker_id} died: {self.engine.failure!r}")
                loop.call_soon_threadsafe(self.legs.die, error)

    async def health(self) -> Load:
        """Raises ClusterError when the engine is dead or stuck, or the KV's memory is broken."""
        if self.engine.failure is not None or not self._thread.is_alive():
            raise ClusterError(f"the engine of {self._worker_id} died: {self.engine.failure!r}")
        if isinstance(self._region, DeviceRegion) and self._region.broken:
            raise ClusterError(f"{self._worker_id}: {self._region.broken}")
        if self.legs.encoder is not None and not self.legs.encoder.alive:
            raise ClusterError(f"{self._worker_id}: the encoder of images died")
        started = self.engine.step_started
        if started is not None and time.monotonic() - started > STUCK_S:
            raise ClusterError(f"the engine of {self._worker_id} is stuck in one step for over {STUCK_S:g} s")
        return self.legs.load()

    async def drain(self, timeout_s: float) -> None:
        await self.legs.drain(timeout_s)

    async def stop(self) -> None:
        self.engine.stop()
        await self._server.stop()
        await self.legs.close()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, 5.0)
        self._region.close()


def _region_of(layout: KvLayout, transport: str, kernels: Kernels, cores: Sequence[int]) -> KvRegion:
    """Memory for the KV, where the transport can reach it. Raises SpecError, UnsupportedSpec."""
    if not in_device_memory(transport):
        return _host_region(layout, cores)
    usable(transport)  # raises if it is not
    from tercet.transfer.memory.cuda import CudaGpu

    try:
        return DeviceRegion(layout, CudaGpu(kernels.device, kernels.copy_runs), kernels.unit_digests)
    except RuntimeError as error:
        raise UnsupportedSpec(
            f"transfer.transport: {transport}: no {_size(layout)} in the GPU's memory: {error}"
        ) from error


def _host_region(layout: KvLayout, cores: Sequence[int]) -> Region:
    """Its pages are near the cores that will compute with them. Raises UnsupportedSpec."""
    region, before = Region(layout), os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread
    try:
        region.populate()
    except OSError as error:
        raise UnsupportedSpec(f"kv.blocks: no {_size(layout)} in this machine's memory: {error}") from error
    finally:
        os.sched_setaffinity(0, before)
    return region


def _size(layout: KvLayout) -> str:
    return f"{layout.total_bytes / 1e9:.1f} GB for {layout.blocks} blocks of KV"
