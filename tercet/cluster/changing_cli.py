"""`tercet scale` and `tercet role set`: what a cluster is asked to change while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from tercet.cluster import output
from tercet.cluster.options import Address, ClusterName, where


def scale(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="encode, prefill, decode or aggregated.")],
    replicas: Annotated[int, typer.Argument(metavar="N", help="Workers that the role is to have, at least 1.")],
    name: ClusterName = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the cluster is so.")] = 180.0,
) -> None:
    """Change how many workers of a role there are, while the cluster serves."""
    name, address = where(name, address)
    from tercet.cluster.scale import scale as scale_cluster

    output.say(scale_cluster(name, address, role, replicas, timeout))


def set_role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its name, as `tercet status` shows it.")],
    role: Annotated[str, typer.Argument(metavar="ROLE", help="encode, prefill, decode or aggregated.")],
    name: ClusterName = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until it serves in that role.")] = 180.0,
) -> None:
    """Give a worker another role, while the cluster serves."""
    name, address = where(name, address)
    from tercet.cluster.set_role import set_role as set_worker_role

    output.say(set_worker_role(name, address, worker, role, timeout))


def register(app: typer.Typer) -> None:
    app.command()(scale)
    roles = typer.Typer(help="Roles of single workers.", no_args_is_help=True)
    roles.command("set")(set_role)
    app.add_typer(roles, name="role")
