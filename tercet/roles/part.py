"""What a worker is made of, besides its legs and ports: parts that it starts, asks for their health, and stops."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from tercet.core import Load, Role
from tercet.kernels.kinds import Kernels
from tercet.spec import ClusterSpec, RoleSpec
from tercet.tls import PeerTls
from tercet.transfer.transports.contract import MoverConfig, Transport
from tercet.transfer.transports.table import usable


@dataclass(frozen=True)
class Identity:
    """Who a worker is, and what it was told."""

    worker_id: str
    role: Role  # the spec's role that sizes it, and the one that it announces
    epoch: int
    spec: ClusterSpec
    host: str
    token: str
    serves: tuple[Role, ...]  # kinds of legs
    cores: tuple[int, ...]  # that its compute threads are pinned to; none: any

    @property
    def role_spec(self) -> RoleSpec:
        return self.spec.roles[self.role]

    def mover_config(self, fingerprint: str) -> MoverConfig:
        transfer = self.spec.transfer
        return MoverConfig(
            self.worker_id,
            fingerprint,
            self.token,
            transfer.lease_s,
            transfer.heartbeat_s,
            transfer.integrity,
            transfer.links,
            tls=self.tls,
        )

    @cached_property
    def tls(self) -> PeerTls | None:
        """Raises SpecError."""
        wanted = self.spec.network.tls
        return None if wanted is None else PeerTls(wanted)

    @property
    def transports(self) -> list[Transport]:
        """What its KV may cross by. Raises SpecError."""
        return usable(self.spec.transfer.transport, tls=self.tls is not None)

    def prepare_thread(self, kernels: Kernels) -> None:
        """Pin the calling thread, and set how many threads compute for it."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # of this thread, and of those that it starts
        kernels.set_threads(self.role_spec.threads)


class Part(ABC):
    fingerprint: str = ""  # of the model that it has

    @abstractmethod
    async def start(self) -> None:
        """Raises ModelError, SpecError, ClusterError."""

    def health(self) -> None:  # noqa: B027  # some cannot fail
        """Raises ClusterError."""

    def counted(self, load: Load) -> Load:
        """With what only the controller is told. May wait for a device."""
        return load

    def begin_stop(self) -> None:  # noqa: B027  # some have nothing that goes on
        """Begin nothing new; the ports are closed and the legs ended between this and `stop`."""

    async def stop(self) -> None:  # noqa: B027  # what handlers hold, they close
        """No leg is left."""
