"""Where a worker's experts lie, from its start on: in their order, or as a plan of `tercet experts solve` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tercet.distributed.expert_map import ExpertMap, default_map
from tercet.errors import ClusterError, UnsupportedSpec
from tercet.models.config import ModelConfig
from tercet.models.loader import LoadedModel
from tercet.spec import ParallelSpec

MOST_BYTES = 1 << 28


def placed_experts(wanted: ParallelSpec, config: ModelConfig) -> ExpertMap | None:
    """None: no rank has whole experts. Raises UnsupportedSpec if the file does not fit the model and the degrees."""
    if wanted.expert == 1:
        return None
    assert config.mixture is not None, "a model without experts is refused before"
    default = default_map(config.mixture.experts, wanted.expert_redundancy, wanted.expert)
    if wanted.expert_plan is None:
        return default
    told = f"expert_plan {wanted.expert_plan}"
    rows, shares = read_plan(told, Path(wanted.expert_plan).expanduser(), wanted.expert)
    layers, slots = config.mixture.layers, default.phy2log.shape[1]
    if tuple(rows.shape) != (len(layers), slots):
        has = f"{len(layers)} layers with experts, and {slots} slots with expert_redundancy {wanted.expert_redundancy}"
        raise UnsupportedSpec(f"{told}: it is for {len(rows)} layers of {rows.shape[1]} slots, and the model has {has}")
    phy2log = default.phy2log.repeat(config.num_layers, 1)  # of a layer without experts nobody asks
    phy2log[list(layers)] = rows
    try:
        placed = ExpertMap(phy2log, config.mixture.experts, default.slots_per_rank)
        its = {} if shares is None else dict(zip(layers, shares.tolist(), strict=True))
        return placed.with_shares({layer: nodes for layer, nodes in its.items() if any(map(any, nodes))})
    except ClusterError as error:
        raise UnsupportedSpec(f"{told}: {error}") from error


def agreed(loaded: LoadedModel) -> str:
    """What all ranks of a worker must have alike: the weights, and where experts lie."""
    spread = loaded.model.ranks.spread
    return loaded.fingerprint if spread is None else f"{loaded.fingerprint} {spread.map.digest}"


def read_plan(told: str, path: Path, ranks: int) -> tuple[Tensor, Tensor | None]:
    """-> phy2log [L, P] int64 of a file of `tercet experts solve --json`, and its shares [L, nodes, P], if it has any.
    told: begins errors. Raises UnsupportedSpec for what is none, or for another number of ranks."""
    if not path.is_file():  # also a pipe, which would be waited for
        raise UnsupportedSpec(f"{told}: {'not a file' if path.exists() else 'there is no such file'}")
    wanted = "`tercet experts solve --json` and `tercet experts show --plan` print plans"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UnsupportedSpec(f"{told}: it has over {MOST_BYTES:,} bytes")
        plan: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedSpec(f"{told}: it is no JSON; {wanted} ({error!s:.60})") from error
    if not isinstance(plan, dict) or not {"ranks", "phy2log"} <= plan.keys():
        raise UnsupportedSpec(f"{told}: it has no `ranks` and `phy2log`; {wanted}")
    rows, of_ranks = _table(told, plan, "phy2log", ["layers", "slots"]), plan["ranks"]
    if of_ranks != ranks:
        raise UnsupportedSpec(f"{told}: it is for {of_ranks} ranks, and not for {ranks}")
    if plan.get("shares") is None:
        return rows, None
    shares = _table(told, plan, "shares", ["layers", "nodes", "slots"])
    if (len(shares), shares.shape[2]) != tuple(rows.shape):
        raise UnsupportedSpec(f"{told}: shares is {list(shares.shape)}, and phy2log {list(rows.shape)}")
    return rows, shares


def _table(told: str, plan: Any, name: str, axes: list[str]) -> Tensor:
    """Raises UnsupportedSpec."""
    try:
        table = torch.tensor(plan[name])
    except (ValueError, TypeError, RuntimeError) as error:
        said = f"{name} is no table of whole numbers, as many in each row"
        raise UnsupportedSpec(f"{told}: {said} ({error!s:.60})") from error
    if table.ndim != len(axes) or table.dtype != torch.int64 or not table.numel():
        wanted = f"whole numbers [{', '.join(axes)}]"
        raise UnsupportedSpec(f"{told}: {name} is {table.dtype} {list(table.shape)}, not {wanted}")
    return table
