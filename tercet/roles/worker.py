"""One worker process: the model, the engine on its thread, the role, and the ports. Cluster starts and watches it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from dataclasses import replace

import torch

from tercet.core import Load, Role, WorkerInfo
from tercet.engine.executor import LocalExecutor
from tercet.engine.loop import Engine
from tercet.engine.runner import Runner
from tercet.errors import ClusterError, WorkerLost
from tercet.models.loader import LoadedModel
from tercet.models.sources import load_model
from tercet.roles.aggregated import Aggregated
from tercet.roles.decode import Decode
from tercet.roles.prefill import Prefill
from tercet.spec import ClusterSpec
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.mover.sender import KvSender
from tercet.transfer.transports.contract import MoverConfig
from tercet.transfer.transports.table import usable
from tercet.wire.worker_server import WorkerServer

STUCK_S = 60.0  # a step that runs longer than any step should: the worker is unhealthy


class Worker:
    def __init__(
        self, worker_id: str, role: Role, epoch: int, spec: ClusterSpec, host: str, cluster_token: str
    ) -> None:
        self._worker_id = worker_id
        self._role = role
        self._epoch = epoch
        self._spec = spec
        self._host = host
        self._token = cluster_token
        self._sender: KvSender | None = None
        self._receiver: KvReceiver | None = None

    async def start(self) -> WorkerInfo:
        """Load the model, open the ports (free ones on `host`). Raises ModelError or ClusterError."""
        loop = asyncio.get_running_loop()
        spec = self._spec.roles[self._role]
        torch.set_num_threads(spec.threads)
        loaded = await loop.run_in_executor(None, load_model, self._spec.model)
        region = self._region = Region(loaded.model.kv_layout(spec.kv.blocks, spec.kv.block_size))
        endpoint = self._make_role(loop, loaded, region)
        runner = Runner(loaded.model, region, self._sender.push if self._sender is not None else None)
        self.engine = Engine(
            LocalExecutor(runner),
            spec,
            min(self._spec.model.max_context, loaded.config.max_context),
            loaded.config.eos_token_ids,
            self._spec.transfer.quarantine_blocks,
            self.handler.on_sampled,
        )
        self.handler.engine = self.engine
        self._thread = threading.Thread(target=self._run_engine, args=(loop,), name="engine", daemon=True)
        self._thread.start()
        self._server = WorkerServer(self.handler, self.load, self._token)
        address = await self._server.start(self._host)
        return WorkerInfo(
            self._worker_id,
            self._role,
            self._epoch,
            address,
            endpoint,
            loaded.fingerprint,
            os.getpid(),
            socket.gethostname(),
        )

    def _make_role(self, loop: asyncio.AbstractEventLoop, loaded: LoadedModel, region: Region) -> str:
        """The role's handler and its side of the mover. -> the transfer endpoint, empty if it has none."""
        spec, transfer = self._spec.roles[self._role], self._spec.transfer
        config = MoverConfig(
            self._worker_id,
            loaded.fingerprint,
            self._token,
            transfer.lease_s,
            transfer.heartbeat_s,
            transfer.integrity,
            transfer.links,
        )
        ways = usable(transfer.transport)
        self.handler: Prefill | Decode | Aggregated
        if self._role is Role.PREFILL:
            limit = spec.scheduler.max_running + spec.scheduler.max_waiting
            self.handler = Prefill(loop, limit)
            self._sender = self.handler.sender = KvSender(
                config, region, ways, self.handler.on_event, lambda: self.engine.computed
            )
            return ""
        if self._role is Role.DECODE:
            self.handler = Decode(loop)
            self._receiver = KvReceiver(config, self._epoch, region, ways, self.handler.on_event)
            self.handler.receiver = self._receiver
            return self._receiver.start(self._host).encode()
        self.handler = Aggregated(loop)
        return ""

    def _run_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self.engine.run()
        finally:
            if self.engine.failure is not None:
                error = WorkerLost(f"the engine of {self._worker_id} died: {self.engine.failure!r}")
                loop.call_soon_threadsafe(self.handler.die, error)

    def load(self) -> Load:
        """The engine's load, with what the mover has counted."""
        load = self.engine.load()
        if self._receiver is not None:
            dropped, refused = self._receiver.dropped().total(), self._receiver.refused().total()
            corrupt = self._receiver.corrupt()
            return replace(load, transfer_dropped=dropped, transfer_refused=refused, transfer_corrupt=corrupt)
        if isinstance(self.handler, Prefill):
            dropped = self.handler.sender.dropped().total()
            return replace(load, transfer_dropped=dropped, pairs=self.handler.pairs())
        return load

    async def health(self) -> Load:
        """Raises ClusterError when the engine is dead or stuck."""
        if self.engine.failure is not None or not self._thread.is_alive():
            raise ClusterError(f"the engine of {self._worker_id} died: {self.engine.failure!r}")
        started = self.engine.step_started
        if started is not None and time.monotonic() - started > STUCK_S:
            raise ClusterError(f"the engine of {self._worker_id} is stuck in one step for over {STUCK_S} s")
        return self.load()

    async def drain(self, timeout_s: float) -> None:
        await self.handler.drain(timeout_s)

    async def stop(self) -> None:
        self.engine.stop()
        await self._server.stop()
        loop = asyncio.get_running_loop()
        if isinstance(self.handler, Prefill):
            self.handler.meet(())  # or it would connect again
        if self._sender is not None:
            await loop.run_in_executor(None, self._sender.stop)
        if self._receiver is not None:
            await loop.run_in_executor(None, self._receiver.stop)
        await loop.run_in_executor(None, self._thread.join, 5.0)
        self._region.close()
