"""Watches the Ray that a controller uses: its control store (GCS) and the node that it runs on.

Without them nothing can be started or replaced, and Ray may end processes at any time. Requests need neither.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from tercet.cluster import bounded, ray_address
from tercet.errors import RayLost

GCS = "Ray's control store (GCS)"
WATCH_EVERY_S = 1.0
ASK_TIMEOUT_S = 2.0


class Home:
    """servers: name -> host:port. Each may be silent for up to `deadline_s`; `report` is told at once."""

    def __init__(
        self, servers: Mapping[str, str], deadline_s: float, report: Callable[[str], None], node_of: str = ""
    ) -> None:
        """node_of: a GCS of which a node must run on this machine; while that node's address is not known yet."""
        self._servers = servers
        self._node_of = node_of
        self._deadline_s = deadline_s
        self._report = report

    async def watch(self) -> None:
        """Never returns. Raises RayLost once a server is silent for too long."""
        answered, told = time.monotonic(), ""
        while True:
            fault = await self._fault()
            if not fault:
                answered = time.monotonic()
            elif time.monotonic() - answered >= self._deadline_s:
                raise RayLost(f"Ray is lost: {fault}")
            if bool(fault) != bool(told):
                self._tell(fault)
                told = fault
            await asyncio.sleep(WATCH_EVERY_S)

    async def _fault(self) -> str:
        """Which server is silent; empty if none is."""
        for name, address in self._servers.items():
            answer = await bounded.wait(f"asking {name}", 2 * ASK_TIMEOUT_S, ray_address.ask, address, ASK_TIMEOUT_S)
            if answer.silent:
                return f"{name} at {address} does not answer ({answer.status}: {answer.details})"
        if self._node_of and not ray_address.owners(self._node_of):
            return f"the node (raylet) of the Ray at {self._node_of} does not run"
        return ""

    def _tell(self, fault: str) -> None:
        grace = f"unless it does within {self._deadline_s:g} s, what runs is finished and the cluster ends"
        self._report(f"{fault}; {grace}" if fault else "Ray answers again")
