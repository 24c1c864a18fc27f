"""Serves a cluster from this process: Ray up, members up, until Ctrl-C, SIGTERM or `tercet down`; then all down.

The first signal drains; a second one kills.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from tercet.cluster.controller import Controller
from tercet.cluster.launcher import Launcher
from tercet.cluster.ray_runtime import RayRuntime
from tercet.cluster.remote import refuse_second
from tercet.cluster.run_file import RunFile
from tercet.placement.roles import local_node, plan
from tercet.spec import ClusterSpec

if TYPE_CHECKING:
    from tercet.roles.gateway.gateway import GatewayInfo

Visit = Callable[["GatewayInfo"], None]


def serve(spec: ClusterSpec, report: Callable[[str], None], ready: Visit, visit: Visit | None = None) -> None:
    """Serve until told to stop. `ready` is called once the cluster is; `visit`, if given, then runs in a thread, and
    its end ends the cluster. Raises TercetError for whatever keeps the cluster from standing.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the loop takes over: leave through `with`
    cpus = int(local_node(spec).resources["CPU"])
    with RunFile(spec.name) as run_file, RayRuntime(spec.ray.address, cpus, run_file.token_path) as runtime:
        refuse_second(spec.name)
        placement = plan(spec, runtime.nodes())
        run_file.write(runtime.address)
        report(f"{'started' if runtime.is_ours else 'joined'} Ray at {runtime.address}")
        launcher = Launcher(spec, placement, secrets.token_hex(16))
        controller = Controller(spec, [w.worker_id for w in placement.workers], launcher, report)

        def announce(info: GatewayInfo) -> None:
            run_file.write(runtime.address, info.http_url)
            ready(info)

        asyncio.run(_serve(controller, announce, visit, report))


async def _serve(controller: Controller, ready: Visit, visit: Visit | None, report: Callable[[str], None]) -> None:
    stop, kill = asyncio.Event(), asyncio.Event()
    _on_signals(stop, kill, report)
    try:
        if await _until(controller.bring_up(), stop):
            ready(controller.gateway_info)
            await _run(controller, stop, visit)
    finally:
        if not await _until(controller.shut_down(), kill):
            await controller.kill()


async def _run(controller: Controller, stop: asyncio.Event, visit: Visit | None) -> None:
    if visit is None:
        await controller.run(stop)
        return
    visiting = asyncio.create_task(asyncio.to_thread(visit, controller.gateway_info))
    visiting.add_done_callback(lambda _: stop.set())
    await controller.run(stop)
    if visiting.done():
        visiting.result()


async def _until(work: Coroutine[Any, Any, None], event: asyncio.Event) -> bool:
    """Do the work unless the event comes first; True if it was done. Raises what the work raises."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        working.result()
        return True
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return False


def _on_signals(stop: asyncio.Event, kill: asyncio.Event, report: Callable[[str], None]) -> None:
    def interrupted() -> None:
        report("killing every worker" if stop.is_set() else "draining; once more kills")
        (kill if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
