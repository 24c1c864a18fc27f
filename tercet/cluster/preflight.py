"""Checks of a spec against this machine that would otherwise fail a minute later, once Ray and the members start."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from tercet.core import Role
from tercet.errors import ModelFileMissing, UnsupportedModel, UnsupportedSpec
from tercet.models.config import ModelConfig
from tercet.models.sources import is_local, load_config, locate, refuse_blocks
from tercet.placement.cores import refuse_missing_cores
from tercet.placement.groups import ModelShape, refuse_indivisible
from tercet.roles.gateway.keys import KeyRing
from tercet.spec import ClusterSpec, ListenSpec
from tercet.tls import GatewayTls, PeerTls
from tercet.transfer.transports import table as transports
from tercet.wire.listening import EVERYWHERE, is_loopback, listen_error

if TYPE_CHECKING:
    from tercet.devices import Device


def check(spec: ClusterSpec, report: Callable[[str], None]) -> None:
    """Check the gateway's ports, keys, certificates and model, since it always runs on this machine. Raises
    ClusterError, ModelError, SpecError."""
    for name, listen in (("http", spec.gateway.http), ("grpc", spec.gateway.grpc)):
        try:
            bind(listen)
        except OSError as error:
            raise listen_error(listen.host, listen.port, error, f"gateway.{name}") from error
    _check_doors(spec, report)
    check_model(spec, report)


def _check_doors(spec: ClusterSpec, report: Callable[[str], None]) -> None:
    """Raises SpecError for files that cannot be read."""
    gateway = spec.gateway
    if gateway.api_keys is not None:
        KeyRing(gateway.api_keys)
    if gateway.tls is not None:
        GatewayTls(gateway.tls, ())
    if spec.network.tls is not None:
        PeerTls(spec.network.tls)
    far = [f"gateway.{name}" for name in ("http", "grpc") if not is_loopback(getattr(gateway, name).host)]
    if far and gateway.api_keys is None:
        report(f"{' and '.join(far)}: whoever reaches {'them' if len(far) > 1 else 'it'} may call; gateway.api_keys")
    elif far and gateway.tls is None:
        report(f"{' and '.join(far)}: API keys cross the network as they are, without gateway.tls")
    if spec.network.host == "node" and spec.network.tls is None:
        report("network.host: node: tokens and KV cross the network as they are, without network.tls")


def check_model(spec: ClusterSpec, report: Callable[[str], None]) -> None:
    """Raises ModelError, UnsupportedSpec."""
    refuse_blocks(spec.model, locate(spec.model))
    config = load_config(spec.model)
    wanted, held = spec.model.max_context, config.max_context
    if config.vision is None and (spec.topology == "ep-d" or Role.ENCODE in spec.roles):
        raise UnsupportedModel(
            f"topology: {spec.topology} is for models that take images, and {spec.model.source} takes none; name a "
            "tower for it by model.vision, or use pd"
        )
    _check_degrees(spec, config)
    if held < wanted:
        report(f"model.max_context is {wanted}, but the model has {held} positions: {held} are served")


def check_degrees_if_here(spec: ClusterSpec) -> bool:
    """Whether the model is on this machine; nothing is fetched. Raises UnsupportedSpec for degrees that do not divide
    it."""
    try:
        if not is_local(spec.model):
            return False
        config = load_config(spec.model)
    except ModelFileMissing:
        return False
    _check_degrees(spec, config)
    return True


def _check_degrees(spec: ClusterSpec, config: ModelConfig) -> None:
    for role, its in spec.roles.items():
        refuse_indivisible(f"roles.{role}.parallelism", its.parallelism, _shape(config))
        if its.parallelism.expert_plan is not None:
            from tercet.roles.placed import placed_experts  # it imports torch, which other specs do without

            placed_experts(its.parallelism, config)


def _shape(config: ModelConfig) -> ModelShape:
    mixture = config.mixture
    dense = mixture is None or len(mixture.layers) < config.num_layers
    return ModelShape(
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        intermediate=config.intermediate_size if dense else 0,
        experts=0 if mixture is None else mixture.experts,
        expert_intermediate=0 if mixture is None else mixture.intermediate_size,
        shared_intermediate=0 if mixture is None else mixture.shared_size,
    )


def refuse_missing_transport(spec: ClusterSpec) -> None:
    """Check the transport, where all workers run on this machine. Raises SpecError."""
    if spec.transfer.transport != transports.AUTO:
        transports.usable(spec.transfer.transport)


def compile_kernels(spec: ClusterSpec, report: Callable[[str], None]) -> None:
    """Compile those for this CPU, if workers here want them: once for all, and not in the time that they have to start.
    Where that fails, each worker says why."""
    if not any(spec.pools[its.pool].accelerator == "cpu" and its.kernels != "torch" for its in spec.roles.values()):
        return
    from tercet.kernels.native import library

    with contextlib.suppress(library.NativeMissingError):
        if not library.is_built():
            report("compiles kernels for this CPU, which is done once: ten seconds to some minutes")
            library.build()


def refuse_what_is_not_here(spec: ClusterSpec) -> None:
    """Check cores, memory, accelerators and kernels, where all workers run on this machine; compiles the kernels if
    they must be native. Raises UnsupportedSpec."""
    refuse_what_does_not_fit(spec)
    native = [f"roles.{role}.kernels: native" for role, wanted in spec.roles.items() if wanted.kernels == "native"]
    if spec.model.dtype == "gguf":
        native = ["model.dtype: gguf takes native kernels"]
    if native:
        from tercet.kernels.native import trial  # it imports torch, which the controller does not need for more

        reason = trial.missing()
        if reason is not None:
            raise UnsupportedSpec(f"{native[0]}: {reason}")


def refuse_what_does_not_fit(spec: ClusterSpec) -> None:
    """Check what the workers take of this machine's cores and memory, where all of them run on it. Raises
    UnsupportedSpec."""
    for role, wanted in spec.roles.items():
        refuse_missing_cores(role, wanted.cpu_affinity or ())
    from tercet.devices import DEVICES  # as above
    from tercet.models import footprint

    kinds = {role: spec.pools[wanted.pool].accelerator for role, wanted in spec.roles.items()}
    # A device of a group holds a part of the model only, which the rank on it checks.
    counted = {role: kind for role, kind in kinds.items() if kind == "cpu" or spec.roles[role].parallelism.ranks == 1}
    for kind in sorted({*counted.values()}):
        replicas = {role: spec.roles[role].replicas for role, its in counted.items() if its == kind}
        footprint.refuse_too_large(spec, replicas, DEVICES[kind], _memory_of(DEVICES[kind]))


def _memory_of(device: Device) -> int:
    """Asked of a GPU's driver in a process of its own, since whoever asks keeps a part of the memory until it ends."""
    if device.kind == "cpu":
        return device.memory_bytes()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as asking:
            return asking.submit(device.memory_bytes).result()
    except BrokenProcessPool as error:
        raise UnsupportedSpec(f"accelerator: {device.kind}: the process that asked for its memory died") from error


def bind(listen: ListenSpec) -> None:
    """Whether it can be. Raises OSError."""
    dual = listen.host == EVERYWHERE and socket.has_dualstack_ipv6()
    found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, _, _, _, where in found:
        socket.create_server(where, family=family, dualstack_ipv6=dual).close()
