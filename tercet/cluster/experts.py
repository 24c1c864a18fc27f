"""What workers of a running cluster have counted of their routing, by windows of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tercet.cluster import ray_runtime, remote
from tercet.cluster.windows import Longs, Look, Rows, counts_of, look_at, rows_between
from tercet.distributed.routed import Routed
from tercet.errors import ClusterError
from tercet.placement.expert_counts import Counts, survives

MOST_BYTES = 1 << 30  # of what is recorded
MOVED_S = 0.2  # between two looks how a move goes
AGAIN_S, LOOK_S = 60.0, 1.0  # for a worker that is being started anew


def record(
    name: str | None,
    address: str,
    worker: str | None,
    windows: int,
    window_s: float,
    keep: Callable[[Counts], None],
    say: Callable[[str], None],
    *,
    pairs: bool = False,
) -> None:
    """Of so many windows from now on; pairs: also which experts follow each other. keep: gets them at the end, or
    those so far if anything ends it before. Raises ClusterError, also if nothing was counted."""
    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        chosen = chosen_of(_members(cluster), worker)
        first, found = _look(cluster, chosen, pairs=pairs), list[Rows]()
        its = first.routed
        size = its.load.nbytes + its.computed.nbytes + (0 if its.pairs is None else its.pairs.nbytes)
        if windows * size > MOST_BYTES:
            raise ClusterError(f"{windows} windows would take over {MOST_BYTES:,} bytes; record fewer")
        try:
            for rows in _windows(cluster, chosen, first, windows, window_s, say, pairs=pairs):
                found.append(rows)
        finally:
            if any(rows.load.any() for rows in found):
                keep(counts_of(chosen, first, found, window_s))
    if not any(rows.load.any() for rows in found):
        raise ClusterError("nothing was counted, so nothing is written: no request was computed meanwhile")


def _windows(
    cluster: str, worker: str, before: Look, windows: int, window_s: float, say: Callable[[str], None], *, pairs: bool
) -> Iterator[Rows]:
    """Raises ClusterError."""
    placed, began = before.routed.phy2log, time.monotonic()
    for number in range(1, windows + 1):
        time.sleep(max(0.0, began + number * window_s - time.monotonic()))
        after = _look(cluster, worker, pairs=pairs)
        if not np.array_equal(after.routed.phy2log, placed):
            raise ClusterError(f"the experts of {worker} were placed anew meanwhile; export again")
        if (rows := rows_between(before, after)) is None:
            say(f"window {number} of {windows}: left out, since a rank was lost or started anew")
        else:
            say(f"window {number} of {windows}: {rows.load.sum():,} rows (a token at an expert in a layer)")
            yield rows
        before = after


def so_far(name: str | None, address: str, worker: str | None) -> dict[str, Longs]:
    """-> of each worker whose experts lie on several ranks, or of that one, [L, R] rows that each rank has computed
    since it started. Raises ClusterError."""
    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        members = _members(cluster)
        wanted = sorted(with_experts(members)) if worker is None else [chosen_of(members, worker)]
        return {at: remote.ask(cluster, "routed", member=at).computed for at in wanted}


def placed(name: str | None, address: str, worker: str | None) -> dict[str, Any]:
    """-> where a worker's experts lie now, as a plan. Raises ClusterError."""
    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        chosen = chosen_of(_members(cluster), worker)
        routed = remote.ask(cluster, "routed", member=chosen)
        shares = None if routed.shares is None else routed.shares.tolist()
        return {"worker": chosen, "ranks": routed.ranks, "phy2log": routed.phy2log.tolist(), "shares": shares}


def move(
    name: str | None,
    address: str,
    worker: str | None,
    plan: Path,
    say: Callable[[str], None],
    *,
    give_up_survival: bool,
) -> dict[str, Any]:
    """Have a running worker move its experts to where the file of `tercet experts solve --json` says, and wait for the
    end of that. -> how many layers changed, and what it says of its moves (`core.Moves`). Raises ClusterError,
    UnsupportedSpec."""
    from tercet.roles.placed import read_plan  # it imports torch, which other commands do without

    with ray_runtime.joined(address):
        cluster = remote.pick(name, address)
        chosen = chosen_of(_members(cluster), worker)
        routed = remote.ask(cluster, "routed", member=chosen)
        rows, shares = read_plan(str(plan), plan, routed.ranks)
        if not give_up_survival and _gives_up_survival(routed, rows.numpy()):
            lost = "some experts would lie on one rank alone, without which the group would not go on"
            raise ClusterError(f"{plan}: {lost}; --give-up-survival moves there all the same")
        before = _members(cluster)[chosen]
        told = None if shares is None else shares.tolist()
        layers, number = remote.ask(cluster, "move_experts", rows.tolist(), told, member=chosen)
        already = "its experts lie so already" + ("" if number == 0 else "; new shares of replicas")
        say(f"{chosen}: layers to place anew: {layers}" if layers else f"{chosen}: {already}")
        moves = _moved(cluster, chosen, before, number, say) if number else before["moves"]
        return {"layers": layers, **moves, "bytes": moves["moved_bytes"] - before["moves"]["moved_bytes"]}


def _gives_up_survival(routed: Routed, rows: Longs) -> bool:
    """False also for what is no placement of the worker, which it refuses itself."""
    now, ranks = routed.phy2log, routed.ranks
    fits = rows.shape == now.shape and rows.min() >= 0 and rows.max() <= now.max()
    return bool(fits) and survives(now, ranks) and not survives(rows, ranks)


def _moved(
    cluster: str, worker: str, before: Mapping[str, Any], number: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Waits for the end of the move of that number. Raises ClusterError."""
    left = None
    while True:
        now = _members(cluster).get(worker, {})
        if (now.get("pid"), now.get("epoch")) != (before["pid"], before["epoch"]):
            raise ClusterError(f"{worker} was started anew meanwhile, with its experts where its spec says")
        moves = dict(now.get("moves") or before["moves"])
        if moves["ended"] >= number:
            break
        if moves["layers_left"] != left and (left := moves["layers_left"]):
            say(f"{worker}: layers left: {left}")
        time.sleep(MOVED_S)
    if moves["alarm"]:
        raise ClusterError(f"{worker} serves on with its experts where they are: {moves['alarm']}")
    return moves


def with_experts(members: Mapping[str, Any]) -> list[str]:
    """Those whose experts lie on several ranks. members: of the controller's overview. Raises ClusterError if none."""
    found = [member for member, its in members.items() if len(its.get("experts", ())) > 1]
    if not found:
        raise ClusterError("no worker of this cluster has experts on several ranks, or it is just starting")
    return found


def chosen_of(members: Mapping[str, Any], worker: str | None) -> str:
    """Raises ClusterError that says which there are."""
    there = sorted(with_experts(members))
    if worker is None and len(there) == 1:
        return there[0]
    if worker not in there:
        told = "say by --worker which one" if worker is None else f"{worker} has no experts on several ranks; these do"
        raise ClusterError(f"{told}: {', '.join(there)}")
    return worker


def _members(cluster: str) -> Mapping[str, Any]:
    members: Mapping[str, Any] = remote.ask(cluster, "health")["members"]
    return members


def _look(cluster: str, worker: str, *, pairs: bool) -> Look:
    """Waits a while for one that is being started anew. Raises ClusterError."""
    deadline = time.monotonic() + AGAIN_S
    while True:
        try:
            routed, member = remote.ask(cluster, "routed", pairs, member=worker), _members(cluster)[worker]
            return look_at(routed, member["pid"], member["node"], member.get("ranks", ()))
        except (ClusterError, KeyError) as error:
            if time.monotonic() > deadline or cluster not in remote.clusters():
                raise ClusterError(f"{worker} of {cluster} is gone: {error}") from error
            time.sleep(LOOK_S)
