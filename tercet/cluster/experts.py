"""What workers of a running cluster have counted of their routing, by windows of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.cluster import ray_runtime, remote
from tercet.distributed.routed import Routed
from tercet.errors import ClusterError
from tercet.placement.experts.weighing import Counts

Longs = NDArray[np.int64]


def record(
    name: str | None, address: str, worker: str | None, windows: int, window_s: float, say: Callable[[str], None]
) -> Counts:
    """Of so many windows from now on. Raises ClusterError."""
    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        members = remote.ask(cluster, "health")["members"]
        chosen = chosen_of(members, worker)
        before, loads = _routed(cluster, chosen), []
        placed, began = before.phy2log, time.monotonic()
        for number in range(1, windows + 1):
            time.sleep(max(0.0, began + number * window_s - time.monotonic()))
            after = _routed(cluster, chosen)
            if after.phy2log.shape != placed.shape or (after.phy2log != placed).any():
                raise ClusterError(f"the experts of {chosen} were placed anew meanwhile; export again")
            loads.append(counted(before, after))
            say(f"window {number} of {windows}: {loads[-1].sum():,} tokens at an expert of a layer")
            before = after
    return _counts(chosen, members[chosen], after, np.array(loads), window_s)


def so_far(name: str | None, address: str, worker: str | None) -> list[Counts]:
    """Of each worker that has experts, or of that one, since it started. Raises ClusterError."""
    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        members = remote.ask(cluster, "health")["members"]
        wanted = sorted(with_experts(members)) if worker is None else [chosen_of(members, worker)]
        found = [(member, _routed(cluster, member)) for member in wanted]
    return [_counts(at, members[at], its, its.load[None], 0.0) for at, its in found]


def with_experts(members: Mapping[str, Any]) -> list[str]:
    """members: of the controller's overview. Raises ClusterError if none has any."""
    found = [member for member, its in members.items() if its.get("experts")]
    if not found:
        raise ClusterError("no worker of this cluster has experts: its model is no mixture, or it is just starting")
    return found


def chosen_of(members: Mapping[str, Any], worker: str | None) -> str:
    """Raises ClusterError that says which there are."""
    there = sorted(with_experts(members))
    if worker is None and len(there) == 1:
        return there[0]
    if worker not in there:
        told = "say by --worker which one" if worker is None else f"{worker} is none that has experts"
        raise ClusterError(f"{told}: {', '.join(there)}")
    return worker


def counted(before: Routed, after: Routed) -> Longs:
    """-> [S, L, n], between the two. A replica that counts less than before has been started anew."""
    restarted = (after.load < before.load).any(axis=(1, 2), keepdims=True)
    found: Longs = np.where(restarted, after.load, after.load - before.load)
    return found


def nodes_of(member: Mapping[str, Any], ranks: int) -> int:
    """How many nodes the ranks are on; 1 if they are not laid out node by node, as many on each."""
    names = [member["node"], *(other["node"] for other in member.get("ranks", ()))][:ranks]
    nodes = len({*names})
    each = ranks // nodes
    by_node = all(len({*names[at : at + each]}) == 1 for at in range(0, ranks, each))
    return nodes if len(names) == ranks and ranks % nodes == 0 and by_node else 1


def _counts(worker: str, member: Mapping[str, Any], its: Routed, load: Longs, window_s: float) -> Counts:
    """load [W, S, L, n]."""
    nodes = nodes_of(member, its.ranks)
    return Counts(load, its.phy2log, its.ranks, nodes, its.top_k, its.expert_bytes, window_s, worker)


def _routed(cluster: str, worker: str) -> Routed:
    found: Routed = remote.ask(cluster, "routed", member=worker)
    return found
