"""Refuses spec settings that would have no effect, because they are not implemented or do not apply."""

from __future__ import annotations

from tercet.core import Role
from tercet.errors import UnsupportedSpec
from tercet.spec import ClusterSpec, PoolSpec, RoleSpec


def refuse_unbuilt(spec: ClusterSpec) -> None:
    """Raises UnsupportedSpec `dotted.path: what is not built`, or what has no effect there."""
    if spec.topology in {"epd", "e-pd"}:
        raise UnsupportedSpec(f"topology: {spec.topology} needs the encode role, which is not built yet; use pd")
    for name, pool in spec.pools.items():
        if pool.accelerator == "npu":
            raise UnsupportedSpec(f"pools.{name}.accelerator: npu is not built yet; use cpu or gpu")
    for role, wanted in spec.roles.items():
        _refuse_role(role, wanted)
        accelerator = spec.pools[wanted.pool].accelerator
        _refuse_devices(f"roles.{role}", wanted, accelerator)
        _refuse_kernels(role, wanted, accelerator, spec.model.dtype)
    for name, pool in spec.pools.items():
        _refuse_devices(f"pools.{name}", pool, pool.accelerator)
    if spec.topology == "aggregated" and spec.transfer.model_fields_set:
        key = min(spec.transfer.model_fields_set)
        raise UnsupportedSpec(f"transfer.{key}: has no effect, since no KV moves in topology aggregated; leave it out")


def _refuse_role(role: Role, wanted: RoleSpec) -> None:
    for kind in ("tensor", "pipeline", "data", "expert"):
        degree = getattr(wanted.parallel, kind)
        if degree > 1:
            raise UnsupportedSpec(f"roles.{role}.parallel.{kind}: degree {degree} is not built yet; use 1")
    if role is Role.DECODE and "max_waiting" in wanted.scheduler.model_fields_set:
        raise UnsupportedSpec(
            f"roles.{role}.scheduler.max_waiting: has no effect, since a decode worker has no queue; leave it out "
            "(requests wait in the gateway; max_running bounds those that are admitted)"
        )


def _refuse_devices(path: str, holder: PoolSpec | RoleSpec, accelerator: str) -> None:
    if holder.npus:
        raise UnsupportedSpec(f"{path}.npus: NPU workers are not built yet; use 0")
    if accelerator != "gpu" and holder.gpus:
        raise UnsupportedSpec(f"{path}.gpus: has no effect in a pool whose accelerator is {accelerator}; use 0")
    if accelerator == "gpu" and isinstance(holder, RoleSpec) and holder.gpus != 1:
        raise UnsupportedSpec(f"{path}.gpus: a worker of a gpu pool runs on one GPU, got {holder.gpus}; use 1")


def _refuse_kernels(role: Role, wanted: RoleSpec, accelerator: str, dtype: str) -> None:
    path = f"roles.{role}.kernels"
    if accelerator == "cpu" and wanted.kernels == "triton":
        raise UnsupportedSpec(f"{path}: triton ones are for GPUs, and pool {wanted.pool} has CPUs; use auto")
    if accelerator == "gpu" and wanted.kernels == "native":
        raise UnsupportedSpec(f"{path}: native ones are for CPUs, and pool {wanted.pool} has GPUs; use auto")
    if dtype == "gguf" and (accelerator == "gpu" or wanted.kernels == "torch"):
        raise UnsupportedSpec(f"model.dtype: gguf takes native kernels, which role {role} does not have; use bfloat16")
