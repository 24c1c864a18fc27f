"""Serves a cluster from this process: Ray up, members up, until Ctrl-C, SIGTERM or `tercet down`; then all down.

The first signal drains; a later one ends at once. All waiting is done in one event loop, so signals are always handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tercet.cluster import bounded, local_ray, preflight, ray_address
from tercet.cluster.controller import Controller
from tercet.cluster.home import GCS, Home
from tercet.cluster.local_ray import LocalRay
from tercet.cluster.members import Target
from tercet.cluster.race import first
from tercet.cluster.run_file import RunFile, Served, reaching
from tercet.core import Loading
from tercet.errors import ClusterError, RayLost, TercetError
from tercet.placement.roles import Placement, local_node, plan
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.cluster.signals import Signals
    from tercet.roles.gateway.gateway import GatewayInfo

Visit = Callable[["GatewayInfo"], None]
Ending = Callable[..., Coroutine[Any, Any, None]]  # of an AsyncExitStack

RESOLVE_TIMEOUT_S = 15.0
COMPILE_TIMEOUT_S = 400.0  # longer than what the compiler is stopped after
JOIN_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 10.0


def serve(
    spec: ClusterSpec,
    signals: Signals,
    report: Callable[[str], None],
    loading: Callable[[str, Loading], None],
    ready: Visit,
    visit: Visit | None = None,
) -> None:
    """Serve until told to stop. `loading` is called with each worker that starts, and how far it is with its model,
    `ready` once the cluster is ready; `visit`, if given, then runs in a thread, and its end ends the cluster. Raises
    the TercetError that kept the cluster from getting ready or ended it, and KeyboardInterrupt if it was told to stop
    before it was ready.
    """
    with RunFile(spec.name) as run_file:
        if not asyncio.run(_Serving(spec, signals, report, loading, run_file).run(ready, visit)):
            raise KeyboardInterrupt
    report(f"cluster {spec.name} is down")


class _Serving:
    """One cluster, from its Ray to its end. What was started is ended in reverse order, however far the start got."""

    def __init__(
        self,
        spec: ClusterSpec,
        signals: Signals,
        report: Callable[[str], None],
        loading: Callable[[str, Loading], None],
        run_file: RunFile,
    ) -> None:
        self._spec = spec
        self._signals = signals
        self._report, self._loading = report, loading
        self._run_file = run_file
        self._served = Served(spec.name, os.getpid())

    async def run(self, ready: Visit, visit: Visit | None) -> bool:
        """-> whether it was ready at any time."""
        self._signals.attach()
        async with AsyncExitStack() as ends:
            starting = asyncio.create_task(self._start(ends))
            if not await _until(starting, self._signals.stop):
                self._report("ending before it stands")
                return False
            controller = starting.result()
            ready(controller.gateway_info)
            await self._run(controller, visit)
        return True

    async def _start(self, ends: AsyncExitStack) -> Controller:
        start_s = self._spec.ray.start_timeout_s
        await bounded.wait("looking at the model", start_s, preflight.check, self._spec, self._report)
        address = await self._find_ray()
        ours = "" if address is not None else await self._start_ray(ends)
        address = address or ours
        # Ray itself would wait long for a server that has died, and not say which.
        home = Home({GCS: address}, self._spec.ray.lost_after_s, self._report, node_of=ours)
        placement, servers = await first(self._join(address, ends), home.watch())
        from tercet.cluster.launcher import Launcher  # only now: Ray reads its environment when it is imported

        home = Home(servers, self._spec.ray.lost_after_s, self._report)
        launcher = Launcher(self._spec.name, secrets.token_hex(16), home, self._spec.network.tls)
        controller = Controller(
            Target(self._spec, placement), launcher, self._report, self._gateway_is_up, self._loading
        )
        ends.push_async_exit(self._ending(controller))
        await controller.bring_up()
        return controller

    async def _join(self, address: str, ends: AsyncExitStack) -> tuple[Placement, dict[str, str]]:
        """-> the placement, and the servers of Ray that we depend on."""
        from tercet.cluster import ray_runtime, remote

        await bounded.wait(f"joining the Ray at {address}", JOIN_TIMEOUT_S, ray_runtime.connect, address)
        ends.push_async_exit(_leaving(ray_runtime.disconnect))
        self._signals.install()  # again: Ray has replaced our handler by one that prints a stack trace
        await bounded.wait("asking Ray for its clusters", 2 * ASK_TIMEOUT_S, remote.refuse_second, self._spec.name)
        self._report(f"its processes log to {ray_runtime.log_folder()}, each on its node")
        nodes = await bounded.wait("asking Ray for its nodes", ASK_TIMEOUT_S, ray_runtime.nodes)
        placement = plan(self._spec, nodes)
        servers = await bounded.wait("asking Ray for its servers", ASK_TIMEOUT_S, ray_runtime.servers, address)
        return placement, servers

    async def _find_ray(self) -> str | None:
        wanted = self._spec.ray.address
        address = await bounded.wait("looking for a Ray", RESOLVE_TIMEOUT_S, ray_address.resolve, wanted, self._report)
        if address is not None:
            others = ", ".join(str(uid) for uid in sorted(ray_address.owners(address) - {os.getuid()}))
            self._report(f"joins the Ray at {address}" + (f", which user {others} runs" if others else ""))
            self._note(ray_address=address)
        return address

    async def _start_ray(self, ends: AsyncExitStack) -> str:
        preflight.refuse_missing_transport(self._spec)
        start_s = self._spec.ray.start_timeout_s
        await bounded.wait("looking at this machine", start_s, preflight.refuse_what_is_not_here, self._spec)
        await bounded.wait("compiling kernels", COMPILE_TIMEOUT_S, preflight.compile_kernels, self._spec, self._report)
        with reaching(self._run_file.folder):
            ray = LocalRay(self._run_file.folder)
            ends.push_async_callback(bounded.wait, "the end of Ray", local_ray.STOP_TIMEOUT_S, ray.stop)
            ray.start(int(local_node(self._spec).resources["CPU"]))
        self._note(ray_folder=str(ray.folder), ray_session=ray.session)
        os.environ.update(ray.environment)
        address = await bounded.wait("Ray's start", self._spec.ray.start_timeout_s, ray.address)
        self._note(ray_address=address, ray_environment=ray.environment)
        self._report(f"started Ray at {address}")
        return address

    async def _run(self, controller: Controller, visit: Visit | None) -> None:
        stop = self._signals.stop
        if visit is None:
            await controller.run(stop)
            return
        visiting = asyncio.wrap_future(bounded.start(visit, controller.gateway_info))
        visiting.add_done_callback(lambda _: stop.set())
        await controller.run(stop)
        if visiting.done():
            visiting.result()

    def _ending(self, controller: Controller) -> Ending:
        async def end(kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
            reason = str(error) if isinstance(error, TercetError) else ""
            ending = asyncio.create_task(controller.shut_down(reason))
            if isinstance(error, RayLost):
                self._report(f"draining: {reason}")
            elif not reason:
                self._report("draining; once more ends at once")
            if not await _until(ending, self._signals.kill):
                await controller.end_now()

        return end

    def _gateway_is_up(self, info: GatewayInfo) -> None:
        if self._served.http_url not in {"", info.http_url}:
            self._report(f"the gateway is now at {info.http_url} (OpenAI), {info.grpc_address} (gRPC)")
        self._note(http_url=info.http_url)

    def _note(self, **known: Any) -> None:
        """Update the run file, which `status` and `down` read. The cluster goes on if that fails."""
        self._served = replace(self._served, **known)
        try:
            self._run_file.write(self._served)
        except ClusterError as error:
            self._report(str(error))


def _leaving(disconnect: Callable[[], None]) -> Ending:
    async def end(kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, RayLost):
            bounded.leave_behind()  # Ray would end this process while it disconnects, with an exit code of its own
            return
        if not await bounded.settled(LEAVE_TIMEOUT_S):  # Ray ends a process that calls it behind its shutdown
            return
        with contextlib.suppress(ClusterError):  # the end of this process leaves it, too
            await bounded.wait("leaving Ray", LEAVE_TIMEOUT_S, disconnect)

    return end


async def _until(work: asyncio.Task[Any], event: asyncio.Event) -> bool:
    """Wait for the work unless the event comes first; True if it is done. Raises what the work raises."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if work.done():
        work.result()
        return True
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return False
