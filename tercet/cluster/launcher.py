"""Starts and ends members as Ray actors; the only file that turns a placement into Ray calls.

A worker runs in its own placement group with a bundle per rank, pinned to the nodes that placement chose while these
live, else to any node with its pool's labels. The gateway takes no CPU and runs on the controller's node. Nothing is
detached: Ray ends every actor when the controller's process ends, however it ends. Calls that Ray may never answer go
through `bounded`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from tercet.cluster import bounded, ports, ray_runtime
from tercet.cluster.actors import GatewayActor, RankActor, WorkerActor
from tercet.cluster.group import GroupActor
from tercet.cluster.home import Home
from tercet.cluster.members import Running, Target
from tercet.cluster.ray_runtime import NAMESPACE, log_folder
from tercet.cluster.reconcile import GATEWAY
from tercet.errors import ClusterError, TercetError, WorkerLost
from tercet.placement.roles import Assignment, Placement, plan
from tercet.spec import ClusterSpec, PeerTlsSpec
from tercet.tls import PeerTls

NODE_ID_LABEL = "ray.io/node-id"
PLACE_TIMEOUT_S = 30.0
POLL_S = 0.1
ASK_TIMEOUT_S = 10.0  # for calls that usually take Ray milliseconds
KILL_TIMEOUT_S = 2.0
MAX_CALLS = 16  # concurrent calls to one actor: health, drain and the like
NAME_TIMEOUT_S = 10.0  # Ray frees the name of a dead actor a moment after its death


def actor_name(cluster: str, member_id: str) -> str:
    return f"{cluster}:{member_id}"


class Actor:
    """A running member, or a rank of one. A call returns its result or raises a TercetError, which is WorkerLost if it
    is dead or silent."""

    others = ()

    def __init__(self, member_id: str, handle: Any, group: PlacementGroup | None) -> None:
        """group: ends with it."""
        self.member_id = member_id
        self._handle = handle
        self._group = group

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self._handle, method).remote(*args)
        except (TimeoutError, GetTimeoutError) as error:
            raise WorkerLost(f"{self.member_id} did not answer {method} in {timeout_s:g} s") from error
        except RayTaskError as error:
            raise _cause(self.member_id, error) from error
        except RayActorError as error:
            raise _death(self.member_id, error) from error
        except RayError as error:
            raise WorkerLost(f"{self.member_id}: {_first_line(error)}") from error

    async def kill(self) -> None:
        """Have Ray SIGKILL it and free its resources. Ray takes 5 s for a process that is stopped (SIGSTOP)."""
        with contextlib.suppress(ClusterError):  # without its GCS Ray cannot; then `stop` has ended the process
            await bounded.wait(f"the end of {self.member_id}", KILL_TIMEOUT_S, self._end)

    def _end(self) -> None:
        ray.kill(self._handle)
        if self._group is not None:
            remove_placement_group(self._group)


class Launcher:
    """Starts members, for the controller (`members.Starter`)."""

    def __init__(self, cluster: str, cluster_token: str, home: Home, tls: PeerTlsSpec | None = None) -> None:
        """Raises SpecError for the files of `tls`."""
        self._cluster = cluster
        self._tls = None if tls is None else PeerTls(tls)
        self._home = home
        self._token = cluster_token

    async def place(self, target: Target, spec: ClusterSpec, taken: Collection[str]) -> Placement:
        """Raises ClusterError."""
        nodes = await bounded.wait("asking Ray for its nodes", ASK_TIMEOUT_S, ray_runtime.nodes)
        return plan(spec, nodes, target.placement.workers, taken)

    async def launch(self, member_id: str, epoch: int, target: Target) -> Running:
        """Create its actors; the caller calls its `start`. Raises ClusterError if Ray has no room for it."""
        if member_id == GATEWAY:
            return await self._gateway(target)
        return await self._worker(target.worker(member_id), epoch, target.spec)

    async def ask_ports(self, info: Any, timeout_s: float) -> None:
        """Raises WorkerLost naming the port."""
        await ports.ask_ports(info, timeout_s, self._tls)

    async def watch_home(self) -> None:
        """Raises RayLost."""
        await self._home.watch()

    async def _gateway(self, target: Target) -> Actor:
        here = NodeAffinitySchedulingStrategy(target.placement.gateway.node_id, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        return Actor(GATEWAY, await self._create(GATEWAY, GatewayActor, options, target.spec, self._token), None)

    async def _worker(self, wanted: Assignment, epoch: int, spec: ClusterSpec) -> Running:
        group = await self._reserve(wanted)
        try:
            ranks = [await self._rank(wanted, rank, epoch, spec, group) for rank in range(len(wanted.nodes))]
        except BaseException:  # including a cancel: nobody else knows the group
            _give_back(group)
            raise
        if len(ranks) == 1:
            return ranks[0]
        return GroupActor(wanted.worker_id, ranks, lambda rank: self._rank(wanted, rank, epoch, spec, group))

    async def _rank(self, wanted: Assignment, rank: int, epoch: int, spec: ClusterSpec, group: PlacementGroup) -> Actor:
        inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        counts = {"num_cpus": wanted.needs.get("CPU", 0), "num_gpus": wanted.needs.get("GPU", 0)}
        others = {kind: amount for kind, amount in wanted.needs.items() if kind not in ("CPU", "GPU")}
        options = {**counts, "resources": others, "scheduling_strategy": inside}
        name = f"{wanted.worker_id} rank {rank}" if len(wanted.nodes) > 1 else wanted.worker_id
        rest = (wanted.role, epoch, spec, wanted.cores_of(rank), self._token)
        if rank == 0:
            made = await self._create(wanted.worker_id, WorkerActor, options, wanted.worker_id, *rest)
            return Actor(name, made, group)
        return Actor(name, await self._create(name, RankActor, options, wanted.worker_id, rank, *rest), None)

    async def _reserve(self, wanted: Assignment) -> PlacementGroup:
        alive = await _alive_nodes()
        pins = [{NODE_ID_LABEL: node.node_id} if node.node_id in alive else {} for node in wanted.nodes]
        place = functools.partial(
            placement_group,
            [dict(wanted.needs) for _ in wanted.nodes],
            strategy="STRICT_PACK" if len(wanted.ranks_on) == 1 else "PACK",
            name=actor_name(self._cluster, wanted.worker_id),
            bundle_label_selector=[{**wanted.labels, **pin} for pin in pins],
        )
        group: PlacementGroup = await bounded.wait(f"placing {wanted.worker_id}", ASK_TIMEOUT_S, place)
        try:
            if await _created(group):
                return group
        except BaseException:
            _give_back(group)
            raise
        _give_back(group)
        raise ClusterError(_no_room(wanted, alive))

    async def _create(self, member_id: str, kind: type, options: dict[str, Any], *args: object) -> Any:
        name = actor_name(self._cluster, member_id)
        actor: Any = ray.remote(kind).options(
            name=name, namespace=NAMESPACE, max_restarts=0, max_concurrency=MAX_CALLS, **options
        )
        for _ in range(int(NAME_TIMEOUT_S / POLL_S)):
            try:
                return await bounded.wait(f"creating {name}", ASK_TIMEOUT_S, actor.remote, *args)
            except ActorAlreadyExistsError:
                await asyncio.sleep(POLL_S)
        raise ClusterError(f"{name}: another actor of this name lives in this Ray; is the cluster served twice?")


async def _alive_nodes() -> set[str]:
    """Their ids."""
    nodes = await bounded.wait("asking Ray for its nodes", ASK_TIMEOUT_S, ray.nodes)
    return {n["NodeID"] for n in nodes if n["Alive"]}


def _no_room(wanted: Assignment, alive: Collection[str]) -> str:
    there = {node.node_id: node.address for node in wanted.nodes}
    where = ", ".join(there.values()) if there.keys() <= {*alive} else f"nodes labelled {dict(wanted.labels)}"
    ranks = f" for each of {len(wanted.nodes)} ranks" if len(wanted.nodes) > 1 else ""
    return (
        f"{wanted.worker_id}: Ray gave no room for {dict(wanted.needs)}{ranks} on {where} in {PLACE_TIMEOUT_S:g} s; "
        "is something else running there?"
    )


async def _created(group: PlacementGroup) -> bool:
    """Whether the group gets its place in time."""
    for _ in range(int(PLACE_TIMEOUT_S / POLL_S)):
        table = await bounded.wait("asking Ray for a placement", ASK_TIMEOUT_S, placement_group_table, group)
        if table["state"] == "CREATED":
            return True
        await asyncio.sleep(POLL_S)
    return False


def _give_back(group: PlacementGroup) -> None:
    """Remove the group without waiting, since this is called while an error is being raised."""
    bounded.start(remove_placement_group, group)


def _cause(member_id: str, error: RayTaskError) -> TercetError:
    cause = error.cause
    if isinstance(cause, TercetError):
        return cause
    return ClusterError(f"{member_id} failed: {type(cause).__name__}: {_first_line(cause)}")


def _death(member_id: str, error: RayActorError) -> TercetError:
    if error.actor_init_failed:
        return ClusterError(f"{member_id} could not be created: {str(error).strip().splitlines()[-1]}")
    text = " ".join(str(error).split())
    why = re.search(r"Worker exit type: \w+|node has died|node was terminated", text)
    cause = why[0] if why else text.partition(" class_name")[0]
    return WorkerLost(f"{member_id} died ({cause}); while Ray runs, its node keeps its log in {log_folder()}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
