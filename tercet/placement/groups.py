"""How a worker of several ranks divides a model, and how its ranks spread over nodes. Pure.

rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank: a tensor group is of consecutive ranks, and so is a
stage, over whose tensor * data ranks its experts are spread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tercet.errors import UnsupportedSpec
from tercet.spec import ParallelSpec

Counts = tuple[tuple[int, int], ...]  # (node, what is put there)


@dataclass(frozen=True)
class ModelShape:
    """What of a model is divided among ranks."""

    layers: int
    heads: int
    kv_heads: int
    intermediate: int  # of the MLP of a layer without experts
    experts: int = 0  # of a layer that has some; 0: no layer has
    expert_intermediate: int = 0  # of one expert
    shared_intermediate: int = 0  # of the experts of a layer that see every token; 0: none


def refuse_indivisible(path: str, wanted: ParallelSpec, model: ModelShape) -> None:
    """path: of the role's `parallelism`. Raises UnsupportedSpec naming the key, its value and the model's number."""
    tensor = wanted.tensor
    for count, what in _divided_by_tensor(wanted, model):
        if count % tensor:
            fits = ", ".join(str(n) for n in range(1, min(count, 16) + 1) if _fits(n, wanted, model))
            raise UnsupportedSpec(
                f"{path}.tensor: {tensor} does not divide the model's {count} {what}; of 1 to 16, {fits} would do"
            )
    if model.kv_heads % tensor and tensor % model.kv_heads:
        raise UnsupportedSpec(
            f"{path}.tensor: {tensor} neither divides the model's {model.kv_heads} KV heads nor is a multiple of them"
        )
    if wanted.pipeline > model.layers:
        raise UnsupportedSpec(f"{path}.pipeline: {wanted.pipeline} is more than the model's {model.layers} layers")
    _refuse_experts(path, wanted, model)


def _fits(tensor: int, wanted: ParallelSpec, model: ModelShape) -> bool:
    heads = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    return heads and all(count % tensor == 0 for count, _ in _divided_by_tensor(wanted, model))


def spreads(rooms: Sequence[int], ranks: int, tensor: int) -> Iterator[tuple[int, ...]]:
    """Every way to spread a group over nodes, as the node of each rank; the best one first.

    rooms: node -> ranks that fit there; among nodes that serve as well the first one is taken. Tensor groups are kept
    whole if possible, since their ranks exchange sums in every layer; then the fewest nodes are the best.
    """
    for counts in _few([room // tensor for room in rooms], ranks // tensor):
        yield tuple(node for node, groups in counts for _ in range(groups * tensor))
    if tensor > 1:
        for counts in _few(rooms, ranks):
            yield _numbered(counts, tensor)


def _divided_by_tensor(wanted: ParallelSpec, model: ModelShape) -> Iterator[tuple[int, str]]:
    yield model.heads, "attention heads"
    yield model.intermediate, "columns of the MLP (intermediate_size)"
    if wanted.expert == 1:  # else each expert is whole on one rank
        yield model.expert_intermediate, "columns of an expert (moe_intermediate_size)"
    yield model.shared_intermediate, "columns of the shared experts"


def _refuse_experts(path: str, wanted: ParallelSpec, model: ModelShape) -> None:
    if wanted.expert == 1:
        return
    if not model.experts:
        raise UnsupportedSpec(f"{path}.expert: {wanted.expert} ranks for experts, and the model has 0 experts; use 1")
    most = (wanted.expert - 1) * model.experts
    if wanted.expert_redundancy > most:
        raise UnsupportedSpec(
            f"{path}.expert_redundancy: {wanted.expert_redundancy} is more than {most}, with which each of the model's "
            f"{model.experts} experts lies on all {wanted.expert} ranks"
        )
    slots = model.experts + wanted.expert_redundancy
    if slots % wanted.expert:
        over = slots % wanted.expert
        near = [wanted.expert_redundancy - over, wanted.expert_redundancy - over + wanted.expert]
        does = " or ".join(str(each) for each in near if each >= 0)
        raise UnsupportedSpec(
            f"{path}.expert: {wanted.expert} does not divide {slots}, the model's {model.experts} experts and "
            f"expert_redundancy {wanted.expert_redundancy}; expert_redundancy {does} would do"
        )


def _few(rooms: Sequence[int], wanted: int) -> Iterator[Counts]:
    """Ways to put `wanted` into such rooms, those with few nodes first."""
    usable = [(node, min(room, wanted)) for node, room in enumerate(rooms) if room > 0]
    largest_first = sorted(usable, key=lambda each: -each[1])
    for nodes in range(1, min(len(usable), wanted) + 1):
        yield from _fill(largest_first, wanted, nodes)


def _fill(rooms: Sequence[tuple[int, int]], wanted: int, nodes: int) -> Iterator[Counts]:
    """Ways to put `wanted` onto exactly so many nodes, something onto each; those that fill nodes first.

    rooms: (node, room), the largest first.
    """
    if not nodes:
        yield ()
        return
    for at in range(len(rooms) - nodes + 1):
        (node, room), others = rooms[at], rooms[at + 1 :]
        least = wanted - sum(room for _, room in others[: nodes - 1])
        if least > room:
            return  # all behind it are smaller
        for count in range(min(room, wanted - nodes + 1), max(least, 1) - 1, -1):
            for rest in _fill(others, wanted - count, nodes - 1):
                yield ((node, count), *rest)


def _numbered(counts: Counts, tensor: int) -> tuple[int, ...]:
    """The node of each rank: first the tensor groups that are whole on their nodes, then those of what is left."""
    whole = [node for node, count in counts for _ in range(count - count % tensor)]
    return (*whole, *(node for node, count in counts for _ in range(count % tensor)))
