"""`tercet experts`: how loads of experts lie, and what another placement of them would be worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group

from tercet.cluster import output
from tercet.cluster.options import Address, AsJson, ClusterName, refuse_unwritable, where
from tercet.errors import SpecError

if TYPE_CHECKING:
    from tercet.placement.expert_counts import Counts
    from tercet.placement.experts.weighing import Weighed, Wish

app = typer.Typer(help="Where the experts of a mixture lie, and where they should.", no_args_is_help=True)

CountsFile = Annotated[Path, typer.Argument(metavar="FILE", help="A file of counts, .npz, by `export` or `import`.")]
WorkerName = Annotated[
    str | None, typer.Option("--worker", help="Its name; needed if several workers have experts on several ranks.")
]
SvgFile = Annotated[Path | None, typer.Option("--svg", help="Write the picture here, too.")]

# Of `solve`.
Policy = Annotated[
    str, typer.Option(help="ilp; eplb: DeepSeek's, to compare; keep: experts stay, only shares of replicas are solved.")
]
ObjectiveName = Annotated[
    str,
    typer.Option(
        help="balance: the busiest rank's rows; with --dispatch weighted also internode: rows that leave their node, "
        "and internode_dedup: the same, a token once for each node; of counts with pairs also interlayer: experts that "
        "follow each other on one node, or on one rank where there is one node."
    ),
]
DispatchName = Annotated[
    str, typer.Option(help="Among replicas: even; or weighted, by shares, which the plan has, too.")
]
Nodes = Annotated[int | None, typer.Option(help="Nodes that the ranks are on; default: as recorded.")]
Redundancy = Annotated[
    int | None, typer.Option(min=0, help="Slots of a layer beyond one for each expert; default: as recorded.")
]
MaxMovedBytes = Annotated[
    int | None, typer.Option(min=0, help="Weights in slots that get another expert, over all layers, at most.")
]
TimeLimit = Annotated[float, typer.Option(min=0.01, max=86_400, help="Seconds.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the search.")]

# Of `import`.
Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="Counts of logical experts: .npy, .json or .pt.")]
Ranks = Annotated[int, typer.Option(min=1, help="That the experts would lie on.")]
TopK = Annotated[int, typer.Option(min=1, help="Experts of a token in a layer, by the model's configuration.")]
Replicas = Annotated[int, typer.Option("--redundancy", min=0, help="Slots of a layer beyond one for each expert.")]
ExpertBytes = Annotated[int, typer.Option(min=1, help="Weights of one expert in one layer.")]


@app.command()
def show(
    worker: WorkerName = None,
    name: ClusterName = None,
    address: Address = None,
    as_json: AsJson = False,
    svg: SvgFile = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print where experts lie now, as a plan for `apply`.")] = False,
) -> None:
    """Show how many rows each rank of a running cluster has computed, layer by layer, since it started."""
    refuse_unwritable("--svg", svg)
    name, address = where(name, address)
    from tercet.cluster import experts, heat_map

    if plan:
        typer.echo(json.dumps(experts.placed(name, address, worker)))
        return
    found = experts.so_far(name, address, worker)
    picture = heat_map.heat_map({f"{at}: {_told(rows)}": rows.astype(float) for at, rows in found.items()})
    if as_json:
        typer.echo(json.dumps({at: {"rows": rows.tolist()} | _evenness(rows) for at, rows in found.items()}))
    else:
        Console().print(picture)
        output.say("Rows since each rank started, whatever was placed anew meanwhile.")
    _draw(svg, "rows of ranks", picture)


@app.command()
def export(
    file: CountsFile,
    worker: WorkerName = None,
    windows: Annotated[int, typer.Option(min=1, max=10_000, help="Windows of time to count in.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="Length of a window.")] = 15.0,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Also which experts follow each other, for objective interlayer.")
    ] = False,
    name: ClusterName = None,
    address: Address = None,
) -> None:
    """Record what a running worker routes to which experts from now on. Ctrl-C keeps the windows so far."""
    refuse_unwritable("FILE", file)
    from tercet.cluster.counts_file import write_counts

    name, address = where(name, address)
    from tercet.cluster import experts

    def keep(counts: Counts) -> None:
        write_counts(file, counts)
        output.say(f"{file}: {len(counts.load)} windows of {seconds:g} s of {counts.worker}, {counts.total:,} rows")

    experts.record(name, address, worker, windows, seconds, keep, output.say, pairs=pairs)


@app.command("import")
def import_(
    source: Source,
    file: CountsFile,
    ranks: Ranks,
    top_k: TopK,
    redundancy: Replicas = 0,
    expert_bytes: ExpertBytes = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on, as many on each.")] = 1,
    worker: Annotated[str | None, typer.Option(help="What to call it; default: the source's name.")] = None,
) -> None:
    """Make a file of counts for `solve` of what another program has recorded. Needs no cluster.

    An array, or nested lists, of whole numbers: layers by experts, or windows by layers by experts; of the windows,
    `solve` judges by the last one. Or what SGLang's expert distribution recorder dumps in its modes stat and
    stat_approx: steps by layers by experts, as `logical_count` in a .pt file or an object in .json. Steps are summed
    into at most 8 windows of about as many steps each. Layers without rows, which have no experts, are left out."""
    refuse_unwritable("FILE", file)
    if file.resolve() == source.resolve():
        raise SpecError(f"FILE {file}: is SOURCE, too, and would be overwritten; name another one")
    from tercet.cluster.counts_file import write_counts
    from tercet.cluster.foreign_counts import Group, import_counts

    group = Group(ranks, nodes, redundancy, top_k, expert_bytes)
    counts, silent = import_counts(source, group, source.stem if worker is None else worker)
    write_counts(file, counts)
    windows, _, layers, experts = counts.load.shape
    left_out = f"; left out, since they have no rows: layers {', '.join(map(str, silent))}" if silent else ""
    output.say(f"{file}: {windows} windows, {layers} layers, {experts} experts, {counts.total:,} rows{left_out}")


@app.command()
def solve(
    file: CountsFile,
    policy: Policy = "ilp",
    objective: ObjectiveName = "balance",
    dispatch: DispatchName = "even",
    nodes: Nodes = None,
    redundancy: Redundancy = None,
    max_moved_bytes: MaxMovedBytes = None,
    time_limit: TimeLimit = 10.0,
    seed: Seed = 0,
    as_json: AsJson = False,
    svg: SvgFile = None,
) -> None:
    """Say where experts should lie by recorded counts, and what that would be worth. Needs no cluster.

    It is solved on all windows but the last one, and judged by that one. Nothing is applied."""
    refuse_unwritable("--svg", svg)
    from tercet.cluster import heat_map
    from tercet.cluster.counts_file import read_counts
    from tercet.placement.experts.model import Dispatch, Objective
    from tercet.placement.experts.weighing import Wish, weigh

    wish = Wish(
        policy,
        Objective(_one_of("--objective", objective, [*Objective])),
        Dispatch(_one_of("--dispatch", dispatch, [*Dispatch])),
        nodes,
        redundancy,
        max_moved_bytes,
        time_limit,
        seed,
    )
    counts = read_counts(file)
    with output.foreign_silenced():  # HiGHS says its name
        found = weigh(counts, wish)
    pictures = {f"{when}: {_told(rows)}": rows for when, rows in (("before", found.before), ("after", found.after))}
    picture = heat_map.heat_map(pictures)
    if as_json:
        typer.echo(json.dumps(_as_json(counts, wish, found), allow_nan=False))
    else:
        console = Console()
        console.print(picture)
        for line in _summary(counts, wish, found):
            console.print(line, highlight=False, soft_wrap=True)
    _draw(svg, f"{counts.worker}: rows of ranks", picture)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A file of `tercet experts solve --json`.")],
    worker: WorkerName = None,
    name: ClusterName = None,
    address: Address = None,
    as_json: AsJson = False,
    give_up_survival: Annotated[
        bool, typer.Option("--give-up-survival", help="Even if the group would no longer go on without a lost rank.")
    ] = False,
) -> None:
    """Move the experts of a running worker to where a plan says, while it serves, and wait until they are there."""
    name, address = where(name, address)
    from tercet.cluster import experts

    say = output.report if as_json else output.say
    moves = experts.move(name, address, worker, plan, say, give_up_survival=give_up_survival)
    if as_json:
        typer.echo(json.dumps(moves))
    elif moves["layers"]:
        pause = f"longest pause of steps so far {moves['longest_pause_s'] * 1e3:.1f} ms"
        output.say(f"done: {moves['bytes']:,} bytes moved in {moves['seconds']:.2f} s, {pause}")


def _draw(svg: Path | None, title: str, picture: Group) -> None:
    from tercet.cluster import heat_map

    if svg is not None:
        heat_map.save_svg(svg, title, picture)
        output.report(f"the picture is in {svg}")


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise SpecError(f"{option} {value!r} is none of {', '.join(known)}")
    return value


def _evenness(rows: Any) -> dict[str, Any]:
    """rows [L, R]."""
    from tercet.placement.experts.weighing import max_over_mean

    return {"max_over_mean": max_over_mean(rows).tolist(), "busiest": float(rows.max(axis=1).sum())}


def _told(rows: Any) -> str:
    from tercet.placement.experts.weighing import max_over_mean

    if not rows.any():
        return "nothing was computed yet"
    over = max_over_mean(rows)
    return f"busiest rank over mean {over.mean():.3f} (mean of layers), {over.max():.3f} (worst layer)"


def _summary(counts: Counts, wish: Wish, found: Weighed) -> Iterator[str]:
    from tercet.placement.experts.weighing import max_over_mean

    how = "solved on the other windows" if found.held_out else "solved on the same one, so it flatters"
    yield f"Judged by the last window, {how}."
    chosen = [_how_chosen(shares, len(counts.phy2log)) for shares in (counts.shares, found.shares)]
    yield f"Before: ranks choose replicas {chosen[0]}. After: {chosen[1]}."
    yield f"Measured in that window, before: {max_over_mean(counts.computed[-1]).mean():.3f} (mean of layers)."
    before, after = (float(rows.max(axis=1).sum()) for rows in (found.before, found.after))
    gain = f"{before:,.0f} rows before, {after:,.0f} after: {after / before - 1:+.1%}"
    yield f"The busiest ranks of all layers compute {gain}."
    fetched = int(found.fetched.sum())
    yield f"Ranks would fetch {fetched:,} experts that they lack: {fetched * counts.expert_bytes:,} bytes."
    if found.topology.nodes > 1:
        yield f"Rows that leave their node: {found.crossing[0]:.1%} before, {found.crossing[1]:.1%} after."
        yield f"Other nodes that a token goes to in a layer: {found.copies[0]:.3f} before, {found.copies[1]:.3f} after."
    if found.staying is not None:
        unit = "node" if found.topology.nodes > 1 else "rank"
        told = f"{found.staying[0]:.1%} before, {found.staying[1]:.1%} after"
        yield f"Pairs of experts of neighbouring layers that lie on one {unit}: {told}."
    if kept := int(found.kept.sum()):
        yield f"{kept} of {len(found.kept)} layers keep what they have: nothing better was found for them."
    if found.topology.least_replicas > 1 and wish.policy == "ilp":
        yield "Each expert stays on two ranks, so that the group goes on without a lost one."
    elif found.survives == (False, False):
        yield "Some experts lie on one rank alone, before and after: the group would not go on without that rank."
    if found.survives == (True, False):
        yield "The group would no longer go on without a lost rank: some experts would lie on one rank alone."
    if reports := found.placement.layers:
        gap, seconds = max(report.gap for report in reports), sum(report.seconds for report in reports)
        every = "the bound of all placements, whatever may move" if wish.objective == "balance" else "its bound"
        told = f"at most {gap:.2%} above {every}" if gap < math.inf else "nothing is known of how far from the best one"
        yield f"The solver, where {wish.dispatch} shares are kept to: {told}; {seconds:.2f} s."
    if found.placement.phy2log.shape != counts.phy2log.shape:
        yield "Nothing was changed. A running worker cannot be moved to this plan: it has another number of slots."
    else:
        yield "Nothing was changed. `tercet experts apply` moves a running worker to the plan that --json prints."


def _how_chosen(shares: Any, layers: int) -> str:
    by_shares = 0 if shares is None else int(shares.any(axis=(1, 2)).sum())
    if not by_shares:
        return "by turns, their own ones first"
    return "by shares" if by_shares == layers else f"by shares in {by_shares} of {layers} layers, else by turns"


def _as_json(counts: Counts, wish: Wish, found: Weighed) -> dict[str, Any]:
    reports = [asdict(report) | {"gap": report.gap} for report in found.placement.layers]
    finite = [{k: None if v == math.inf else v for k, v in report.items()} for report in reports]
    return {
        "worker": counts.worker,
        "wish": asdict(wish),
        "ranks": counts.ranks,
        "nodes": found.topology.nodes,
        "slots_per_rank": found.topology.slots_per_gpu,
        "held_out": found.held_out,
        "before": _evenness(found.before),
        "after": _evenness(found.after),
        "measured": _evenness(counts.computed[-1]),
        "kept": found.kept.tolist(),
        "fetched": found.fetched.tolist(),
        "fetched_bytes": int(found.fetched.sum()) * counts.expert_bytes,
        "cross_node": dict(zip(("before", "after"), found.crossing, strict=True)),
        "node_copies": dict(zip(("before", "after"), found.copies, strict=True)),
        "pairs_staying": None if found.staying is None else dict(zip(("before", "after"), found.staying, strict=True)),
        "survives_a_rank": dict(zip(("before", "after"), found.survives, strict=True)),
        "layers": finite,
        "phy2log": found.placement.phy2log.tolist(),
        "shares": None if found.shares is None else found.shares.tolist(),
    }
