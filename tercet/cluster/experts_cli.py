"""`tercet experts`: how loads of experts lie, and what another placement of them would be worth."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tercet.cluster import output
from tercet.cluster.options import Address, AsJson, ClusterName, where
from tercet.errors import SpecError

if TYPE_CHECKING:
    from tercet.placement.experts.weighing import Counts, Weighed, Wish

app = typer.Typer(help="Where the experts of a mixture lie, and where they should.", no_args_is_help=True)

CountsFile = Annotated[Path, typer.Argument(metavar="FILE", help="A file of counts, .npz, by `tercet experts export`.")]
WorkerName = Annotated[str | None, typer.Option("--worker", help="Its name; needed if several have experts.")]
SvgFile = Annotated[Path | None, typer.Option("--svg", help="Write the picture here, too.")]


@app.command()
def show(
    worker: WorkerName = None,
    name: ClusterName = None,
    address: Address = None,
    as_json: AsJson = False,
    svg: SvgFile = None,
) -> None:
    """Show how even the loads of a running cluster's ranks are, since they started."""
    name, address = where(name, address)
    from tercet.cluster import experts, heat_map
    from tercet.placement.experts.weighing import loads_of

    found = {counts.worker: loads_of(counts) for counts in experts.so_far(name, address, worker)}
    if as_json:
        typer.echo(json.dumps({at: {"loads": loads.tolist()} | _evenness(loads) for at, loads in found.items()}))
        return
    picture = heat_map.heat_map({f"{at}: {_told(loads)}": loads for at, loads in found.items()})
    Console().print(picture)
    if svg is not None:
        heat_map.save_svg(svg, "loads of ranks", picture)


@app.command()
def export(
    file: CountsFile,
    worker: WorkerName = None,
    windows: Annotated[int, typer.Option(min=1, max=10_000, help="Windows of time to count in.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="Length of a window.")] = 15.0,
    name: ClusterName = None,
    address: Address = None,
) -> None:
    """Record what a running worker routes to which experts from now on."""
    from tercet.cluster.counts_file import write_counts

    name, address = where(name, address)
    from tercet.cluster import experts

    counts = experts.record(name, address, worker, windows, seconds, output.say)
    write_counts(file, counts)
    output.say(f"{file}: {windows} windows of {seconds:g} s of {counts.worker}, {counts.total:,} tokens at an expert")


@app.command()
def solve(
    file: CountsFile,
    policy: Annotated[str, typer.Option(help="ilp, or eplb: DeepSeek's.")] = "ilp",
    objective: Annotated[
        str, typer.Option(help="balance, internode, internode_dedup: the last two for weighted dispatch.")
    ] = "balance",
    dispatch: Annotated[
        str, typer.Option(help="Among replicas: even, as ranks do; weighted, which ranks cannot yet.")
    ] = "even",
    nodes: Annotated[int | None, typer.Option(help="Nodes that the ranks are on; default: as recorded.")] = None,
    redundancy: Annotated[
        int | None, typer.Option(min=0, help="Slots of a layer beyond one for each expert; default: as recorded.")
    ] = None,
    max_moved_bytes: Annotated[int | None, typer.Option(min=0, help="Of weights, over all layers.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    as_json: AsJson = False,
    svg: SvgFile = None,
) -> None:
    """Say where experts should lie by recorded counts, and what that would be worth. Needs no cluster.

    It is solved on all windows but the last one, and judged by that one. Nothing is applied."""
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
    with output.foreign_to_stderr():  # HiGHS says its name
        found = weigh(counts, wish)
    if as_json:
        typer.echo(json.dumps(_as_json(counts, wish, found)))
        return
    pictures = {f"{when}: {_told(loads)}": loads for when, loads in (("before", found.before), ("after", found.after))}
    picture = heat_map.heat_map(pictures)
    console = Console()
    console.print(picture)
    for line in _summary(counts, found):
        console.print(line, highlight=False, soft_wrap=True)
    if svg is not None:
        heat_map.save_svg(svg, f"{counts.worker}: loads of ranks", picture)


def _one_of(option: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise SpecError(f"{option} {value!r} is none of {', '.join(known)}")
    return value


def _evenness(loads: Any) -> dict[str, Any]:
    """loads [L, R]."""
    from tercet.placement.experts.weighing import max_over_mean

    over = max_over_mean(loads)
    return {"max_over_mean": over.tolist(), "busiest": float(loads.max(axis=1).sum())}


def _told(loads: Any) -> str:
    from tercet.placement.experts.weighing import max_over_mean

    if not loads.any():
        return "nothing was computed yet"
    over = max_over_mean(loads)
    return f"busiest rank over mean {over.mean():.3f}, in the worst layer {over.max():.3f}"


def _summary(counts: Counts, found: Weighed) -> list[str]:
    before, after = (float(loads.max(axis=1).sum()) for loads in (found.before, found.after))
    how = "solved on the other windows" if found.held_out else "solved on the same window, so it flatters"
    lines = [
        f"judged by the last window, {how}",
        f"the busiest ranks of all layers compute {before:,.0f} before, {after:,.0f} after: {after / before - 1:+.1%}",
        f"{int(found.moved.sum())} of {found.placement.phy2log.size} slots would hold another expert: "
        f"{int(found.moved.sum()) * counts.expert_bytes:,} bytes",
    ]
    if reports := found.placement.layers:
        gap = max(report.gap for report in reports)
        seconds = sum(report.seconds for report in reports)
        lines.append(f"on what it was solved for, at most {gap:.2%} above the bound of any placement; {seconds:.2f} s")
    return [*lines, "nothing was changed: applying a placement to a running cluster is not built yet"]


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
        "moved_slots": found.moved.tolist(),
        "moved_bytes": int(found.moved.sum()) * counts.expert_bytes,
        "layers": finite,
        "phy2log": found.placement.phy2log.tolist(),
    }
