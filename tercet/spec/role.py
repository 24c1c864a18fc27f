"""What a spec says of one role: its workers, their ranks, and what each of them has."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from tercet.spec.base import Frozen, Name, Positive, Text

MOST_RANKS = 512  # of a worker; DeepSeek-V3 decodes on 320 (arXiv:2412.19437, section 3.4.2)


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
    """The workers of one role.

    Its own faults name their path within it; `cluster/spec_file.py` puts the role before it.
    """

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
