"""`tercet scale`, `tercet role set` and `tercet down`: what a cluster that serves is asked to change."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cluster import output, run_file
from tercet.cluster.options import Address, AsJson, ClusterName, where

if TYPE_CHECKING:
    from tercet.cluster.scale import Scaled
    from tercet.cluster.set_role import RoleSet


def scale(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="encode, prefill, decode or aggregated.")],
    replicas: Annotated[int, typer.Argument(metavar="N", help="Workers that the role is to have, at least 1.")],
    name: ClusterName = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the cluster is so.")] = 180.0,
    as_json: AsJson = False,
) -> None:
    """Change how many workers of a role there are, while the cluster serves."""
    name, address = where(name, address)
    from tercet.cluster.scale import scale as scale_cluster

    _say(scale_cluster(name, address, role, replicas, timeout), as_json=as_json)


def set_role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its name, as `tercet status` shows it.")],
    role: Annotated[str, typer.Argument(metavar="ROLE", help="encode, prefill, decode or aggregated.")],
    name: ClusterName = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until it serves in that role.")] = 180.0,
    as_json: AsJson = False,
) -> None:
    """Give a worker another role, while the cluster serves."""
    name, address = where(name, address)
    from tercet.cluster.set_role import set_role as set_worker_role

    _say(set_worker_role(name, address, worker, role, timeout), as_json=as_json)


def down(
    name: ClusterName = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until it is gone.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Drain a cluster that another process serves, and end it."""
    if address is None:
        ended = run_file.end(name, timeout)
    else:
        from tercet.cluster import remote

        ended = remote.down(name, address, timeout)
    output.say(json.dumps({"cluster": ended, "down": True}) if as_json else f"cluster {ended} is down")


def _say(done: Scaled | RoleSet, *, as_json: bool) -> None:
    output.say(json.dumps(asdict(done)) if as_json else str(done))


def register(app: typer.Typer) -> None:
    app.command()(scale)
    app.command()(down)
    roles = typer.Typer(help="Roles of single workers.", no_args_is_help=True)
    roles.command("set")(set_role)
    app.add_typer(roles, name="role")
