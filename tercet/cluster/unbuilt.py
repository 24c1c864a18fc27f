"""Refuses spec settings that would have no effect, because they are not implemented or do not apply."""

from __future__ import annotations

from tercet.core import Role
from tercet.errors import UnsupportedSpec
from tercet.spec import ClusterSpec, PoolSpec, RoleSpec


def refuse_unbuilt(spec: ClusterSpec) -> None:
    """Raises UnsupportedSpec `dotted.path: what is not built`, or what has no effect there."""
    for role, wanted in spec.roles.items():
        _refuse_role(role, wanted)
        if wanted.parallelism.ranks > 1:
            refuse_groups(spec, role, wanted)
        accelerator = spec.pools[wanted.pool].accelerator
        _refuse_devices(f"roles.{role}", wanted, accelerator)
        _refuse_kernels(role, wanted, accelerator, spec.model.dtype)
        _refuse_transport(role, wanted, accelerator, spec.transfer.transport)
    for name, pool in spec.pools.items():
        _refuse_devices(f"pools.{name}", pool, pool.accelerator)
    if spec.network.tls is not None:
        _refuse_open_transport(spec.transfer.transport)
    if spec.topology == "aggregated" and spec.transfer.model_fields_set:
        key = min(spec.transfer.model_fields_set)
        raise UnsupportedSpec(f"transfer.{key}: has no effect, since no KV moves in topology aggregated; leave it out")


def refuse_groups(spec: ClusterSpec, role: Role, wanted: RoleSpec) -> None:
    """What a worker of several ranks does not do yet."""
    path, parallelism = f"roles.{role}", wanted.parallelism
    ranks = parallelism.ranks
    if Role.ENCODE in spec.roles:
        raise UnsupportedSpec(
            f"{path}.parallelism: {parallelism.ranks} ranks take no images yet; use 1 for each degree"
        )
    if spec.network.tls is not None:
        raise UnsupportedSpec(f"{path}.parallelism: {ranks} ranks do not speak TLS with each other yet (network.tls)")
    if not isinstance(wanted.cuda_graphs, str):
        raise UnsupportedSpec(f"{path}.cuda_graphs: no step of {ranks} ranks is captured yet; use auto")


def _refuse_role(role: Role, wanted: RoleSpec) -> None:
    if role is Role.ENCODE and wanted.parallelism.ranks > 1:
        raise UnsupportedSpec(
            f"roles.{role}.parallelism: {wanted.parallelism.ranks} ranks, but an encode worker is a single process; "
            "use replicas"
        )
    if role is Role.DECODE and "max_waiting" in wanted.scheduler.model_fields_set:
        raise UnsupportedSpec(
            f"roles.{role}.scheduler.max_waiting: has no effect, since a decode worker has no queue; leave it out "
            "(requests wait in the gateway; max_running bounds those that are admitted)"
        )
    if role is Role.ENCODE and (given := wanted.model_fields_set & {"kv", "cuda_graphs"}):
        raise UnsupportedSpec(f"roles.{role}.{min(given)}: has no effect, since an encode worker has no text model")
    if role is Role.ENCODE and "token_budget" in wanted.scheduler.model_fields_set:
        raise UnsupportedSpec(f"roles.{role}.scheduler.token_budget: has no effect; images.patch_budget is its own")
    if role is Role.DECODE and "images" in wanted.model_fields_set:
        raise UnsupportedSpec(f"roles.{role}.images: has no effect, since a decode worker gets no images; leave it out")
    if role is Role.PREFILL and not isinstance(wanted.cuda_graphs, str):
        raise UnsupportedSpec(
            f"roles.{role}.cuda_graphs: has no effect, since a prefill worker decodes none; leave it out"
        )


def _refuse_devices(path: str, holder: PoolSpec | RoleSpec, accelerator: str) -> None:
    for kind, count in (("gpu", holder.gpus), ("npu", holder.npus)):
        if accelerator != kind and count:
            raise UnsupportedSpec(f"{path}.{kind}s: has no effect in a pool whose accelerator is {accelerator}; use 0")
        if accelerator == kind and isinstance(holder, RoleSpec) and count != 1:
            named = f"a rank of this pool runs on one {kind.upper()}"
            raise UnsupportedSpec(f"{path}.{kind}s: {named}, got {count}; use 1")


def _refuse_kernels(role: Role, wanted: RoleSpec, accelerator: str, dtype: str) -> None:
    path, place = f"roles.{role}", f"pool {wanted.pool} has {accelerator.upper()}s"
    if accelerator != "gpu" and wanted.kernels == "triton":
        raise UnsupportedSpec(f"{path}.kernels: triton ones are for GPUs, and {place}; use auto")
    if accelerator != "cpu" and wanted.kernels == "native":
        raise UnsupportedSpec(f"{path}.kernels: native ones are for CPUs, and {place}; use auto")
    if dtype == "gguf" and (accelerator != "cpu" or wanted.kernels == "torch"):
        raise UnsupportedSpec(f"model.dtype: gguf takes native kernels, which role {role} does not have; use bfloat16")
    if not isinstance(wanted.cuda_graphs, str) and (accelerator != "gpu" or wanted.kernels == "torch"):
        raise UnsupportedSpec(
            f"{path}.cuda_graphs: steps are captured on a GPU, with Triton's kernels, which role {role} does not have; "
            "use auto"
        )


def _refuse_open_transport(transport: str) -> None:
    from tercet.transfer.transports.table import keeps_secret  # only now: numpy

    if not keeps_secret(transport):
        raise UnsupportedSpec(
            f"transfer.transport: {transport} sends KV to other hosts as it is, and network.tls asks for TLS; use "
            "auto, tcp or shm"
        )


def _refuse_transport(role: Role, wanted: RoleSpec, accelerator: str, transport: str) -> None:
    if accelerator == "gpu" or transport == "auto":
        return
    from tercet.transfer.transports.table import in_device_memory  # only now: numpy

    if in_device_memory(transport):
        raise UnsupportedSpec(
            f"transfer.transport: {transport} moves KV between GPUs, and pool {wanted.pool} of role {role} has "
            f"accelerator {accelerator}; use auto"
        )
