"""The tables that the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tercet.core import STAGES, Role
from tercet.placement.roles import Assignment, Node, Placement, own_labels
from tercet.spec import EMBEDDING_BLOCK, ClusterSpec, RoleSpec
from tercet.wire.listening import address

if TYPE_CHECKING:
    from tercet.cluster.doctor import Finding
    from tercet.roles.gateway.keys import Key


def keys_table(keys: Sequence[Key]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "requests a minute", "tokens a minute", "at once", "digest"):
        table.add_column(column, overflow="fold")
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent)
        table.add_row(
            key.name, *("any" if limit is None else f"{limit:,}" for limit in limits), f"{key.sha256[:12]}..."
        )
    return table


def plan_table(spec: ClusterSpec, placement: Placement) -> Table:
    http, grpc = spec.gateway.http, spec.gateway.grpc
    table = Table(
        title=f"cluster {spec.name}: {spec.model.source}, {spec.model.dtype}, topology {spec.topology}",
        caption=f"gateway at {address(http.host, http.port)} (HTTP) and {address(grpc.host, grpc.port)} (gRPC)",
    )
    for column in ("member", "role", "pool", "node", "takes", "memory for"):
        table.add_column(column, overflow="fold")
    table.add_row("gateway", "", "", _place(placement.gateway), "", "")
    for worker in placement.workers:
        role = spec.roles[worker.role]
        takes, held = _takes(role, worker), _held(worker.role, role)
        table.add_row(worker.worker_id, worker.role, role.pool, _places(worker), takes, held)
    return table


def plan_facts(spec: ClusterSpec, placement: Placement) -> dict[str, Any]:
    """The same as plain data. A worker's nodes and cores are those of rank 0, 1 ...; needs are of one rank."""
    workers = [
        {
            "member": worker.worker_id,
            "role": worker.role,
            "pool": spec.roles[worker.role].pool,
            "nodes": [node.address for node in worker.nodes],
            "needs": dict(worker.needs),
            "threads": spec.roles[worker.role].threads,
            "cores": [list(worker.cores_of(rank)) for rank in range(len(worker.nodes))],
            "holds": _held(worker.role, spec.roles[worker.role]),
        }
        for worker in placement.workers
    ]
    http, grpc = spec.gateway.http, spec.gateway.grpc
    listens = {"http": address(http.host, http.port), "grpc": address(grpc.host, grpc.port)}
    gateway = {"node": placement.gateway.address, **listens}
    return {"cluster": spec.name, "topology": spec.topology, "gateway": gateway, "workers": workers}


def _place(node: Node) -> str:
    return " ".join([node.address, *(f"{k}={v}" for k, v in own_labels(node).items())])


def _places(worker: Assignment) -> str:
    """A line per node; of a group with the ranks there."""
    if len(worker.nodes) == 1:
        return _place(worker.node)
    return "\n".join(f"{_place(worker.nodes[ranks[0]])}: {_told('rank', ranks)}" for ranks in worker.ranks_on.values())


def _takes(role: RoleSpec, worker: Assignment) -> str:
    amounts = ", ".join(f"{amount:g} {kind}" for kind, amount in worker.needs.items())
    takes = f"{amounts}, {role.threads} thread{'s' if role.threads > 1 else ''}"
    if len(worker.nodes) == 1:
        return takes + (f" on {_told('core', worker.cores)}" if worker.cores else "")
    given = role.parallelism.model_dump(exclude={"expert_plan"})
    degrees = ", ".join(f"{kind} {degree}" for kind, degree in given.items() if degree > 1)
    pinned = [f"rank {rank} on {_told('core', cores)}" for rank, cores in enumerate(worker.rank_cores)]
    return "\n".join([f"{len(worker.nodes)} ranks ({degrees}), each {takes}", *pinned])


def _told(what: str, numbers: Sequence[int]) -> str:
    """core 3; cores 3, 5; ranks 0-7."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and [*numbers] == [*range(first, last + 1)]:
        return f"{what}s {first}-{last}"
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _held(name: Role, role: RoleSpec) -> str:
    """Of a group: its ranks of the same requests hold parts of the same tokens."""
    if name is Role.ENCODE:
        return f"{role.images.blocks * EMBEDDING_BLOCK:,} tokens of images"
    return f"{role.parallelism.data * role.kv.blocks * role.kv.block_size:,} tokens of KV"


def doctor_table(findings: Sequence[Finding]) -> Table:
    table = Table(title="what this machine can use")
    for column in ("what", "usable", "why"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.good else "no", finding.told)
    return table


def pairs_table(status: Mapping[str, Any]) -> Table:
    """The pairs of workers, as measured when each connected."""
    table = Table(title="pairs")
    for column in ("from", "to", "transport", "MB/s", "round trip, µs"):
        table.add_column(column, overflow="fold")
    for worker_id, worker in sorted(status["workers"].items()):
        for pair in (worker["load"] or {}).get("pairs", ()):
            speed = [f"{pair['bandwidth'] / 1e6:,.0f}", f"{pair['latency_s'] * 1e6:,.0f}"]
            table.add_row(worker_id, pair["worker_id"], pair["fault"] or pair["transport"], *speed)
    return table


def experts_table(status: Mapping[str, Any]) -> Table:
    """Which rank has computed how much of which experts, since its start; no row if the model has none."""
    table = Table(title="experts", caption="one row: one token, one expert, one layer")
    for column in ("worker", "rank", "experts so far", "rows", "share"):
        table.add_column(column, overflow="fold", justify="right" if column in {"rows", "share"} else "left")
    for worker_id, member in sorted(status["members"].items()):
        ranks = member.get("experts", ())
        total = sum(sum(rank["rows"]) for rank in ranks)
        for rank in ranks:
            rows = sum(rank["rows"])
            share = f"{rows / total:.0%}" if total else ""
            table.add_row(worker_id, str(rank["rank"]), _runs(sorted(rank["experts"])), f"{rows:,}", share)
    return table


def placement_table(status: Mapping[str, Any]) -> Table:
    """How experts were placed anew since workers started; no row if nothing was tried."""
    table = Table(title="placement of experts")
    for column in ("worker", "layers placed anew", "moved", "last"):
        table.add_column(column, overflow="fold")
    for worker_id, member in sorted(status["members"].items()):
        moves, placing = member.get("moves"), member.get("placing")
        if moves is None or not (placing or moves["done"] or moves["failed"] or moves["layers_left"]):
            continue
        left = f"{moves['layers_left']} layers to go" if moves["layers_left"] else ""
        last = left or moves["alarm"] or placing.get("outcome", "")
        table.add_row(worker_id, str(moves["epoch"]), f"{moves['moved_bytes']:,} bytes", last)
    return table


def _runs(numbers: Sequence[int]) -> str:
    """0-3, 8, 8: in ascending order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def status_table(status: Mapping[str, Any]) -> Table:
    """status: what `remote.status` gives. A worker's requests: running + waiting. It fits into 80 columns."""
    ready = "ready" if status["ready"] else f"not ready: {status['reason']}"
    if lacking := [m for m, w in sorted(status["workers"].items()) if (w["load"] or {}).get("ranks_lost")]:
        ready += f", degraded: {', '.join(lacking)} without a rank,"
    wanted = ", ".join(f"{replicas} {role}" for role, replicas in status["target"].items())
    title = f"{status['name']}: {ready} at {status['http_url']}, gRPC {status['grpc_address']}"
    table = Table(title=title, caption=f"target: {wanted}" if wanted else None, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("member", "role", "state", "epoch", "pid", "node", "requests", "KV free"):
        table.add_column(column, overflow="fold", no_wrap=column in {"member", "role", "state"})
    table.add_row("gateway", "", "", "", str(status["pid"]), str(status["node"]), str(status.get("inflight", "")), "")
    for worker_id in sorted({*status["members"], *status["workers"]}):
        # The gateway's workers and the controller's members come separately, so one may be ahead of the other.
        worker = {"state": "", "pid": "", "node": "", "load": None, **status["workers"].get(worker_id, {})}
        worker |= status["members"].get(worker_id, {})
        load = worker["load"] or {}
        blocks = f"{load['blocks_free']}/{load['blocks_total']}" if load else "unknown"
        if load and not load["blocks_total"]:  # an encode worker has none
            blocks = ""
        requests = f"{load['running']}+{load['waiting']}" if load else ""
        row = [worker[key] for key in ("role", "state", "epoch", "pid", "node")]
        table.add_row(worker_id, *map(str, row), requests, blocks)
        for rank, place in enumerate(worker.get("ranks", ()), 1):
            state, pid = ("lost", "") if place.get("lost") else ("", str(place["pid"]))
            table.add_row(f"  rank {rank}", "", state, "", pid, str(place["node"]), "", "")
    return table


def losses(status: Mapping[str, Any]) -> list[str]:
    """A line for each worker that was lost, as far as its present incarnation knows. status: as `status_table`'s."""
    members = sorted(status["members"].items())
    told = [(m, w["epoch"], w["reason"] if w["state"] == "lost" else w.get("last_loss", "")) for m, w in members]
    return [f"{m} (now epoch {epoch}) was lost: {why}" for m, epoch, why in told if why]


def timings_table(timings: Mapping[str, Any]) -> Table:
    """timings: the object that a response's last chunk carries."""
    table = Table(title="what this request took, and where")
    table.add_column("stage")
    table.add_column("value", justify="right")
    for label, key in _STAGES:
        table.add_row(label, f"{1e3 * float(timings[key]):,.1f} ms")
    table.add_section()
    table.add_row("KV bytes moved", f"{int(timings['kv_bytes']):,}")
    table.add_row("transport", str(timings["transport"]) or "none")
    for role, worker_id in timings["workers"].items():
        table.add_row(f"{role} by", str(worker_id))
    table.add_row("attempts", str(timings["attempts"]))
    return table


_STAGES = (
    ("gateway", "gateway_s"),
    *((stage.replace("_", " "), f"{stage}_s") for stage in STAGES),
    ("TTFT (time to first token)", "ttft_s"),
    ("TPOT (time per output token)", "tpot_s"),
)
