"""What a spec can say before it is built: refused by name, never ignored."""

from __future__ import annotations

from tercet.core import Role
from tercet.errors import UnsupportedSpec
from tercet.spec import ClusterSpec, RoleSpec


def refuse_unbuilt(spec: ClusterSpec) -> None:
    """Raises UnsupportedSpec `dotted.path: what is not built`."""
    if spec.topology in {"epd", "e-pd"}:
        raise UnsupportedSpec(f"topology: {spec.topology} needs the encode role, which is not built yet; use pd")
    for name, pool in spec.pools.items():
        if pool.accelerator != "cpu":
            raise UnsupportedSpec(f"pools.{name}.accelerator: {pool.accelerator} is not built yet; use cpu")
    for role, wanted in spec.roles.items():
        _refuse_role(role, wanted)


def _refuse_role(role: Role, wanted: RoleSpec) -> None:
    for kind in ("tensor", "pipeline", "data", "expert"):
        degree = getattr(wanted.parallel, kind)
        if degree > 1:
            raise UnsupportedSpec(f"roles.{role}.parallel.{kind}: degree {degree} is not built yet; use 1")
    for kind in ("gpus", "npus"):
        if getattr(wanted, kind):
            raise UnsupportedSpec(f"roles.{role}.{kind}: {kind[:-1].upper()} workers are not built yet; use 0")
