"""Who computed which experts, as ranks tell it to rank 0, and a worker with its health to the controller."""

from __future__ import annotations

from tercet.core import ExpertRows
from tercet.models.shard import Shard
from tercet.models.transformer import Transformer


def expert_rows(model: Transformer) -> ExpertRows | None:
    """Of this rank; None where there are no experts, or only columns of each. May wait for the device."""
    if model.routing is None:
        return None
    ranks, routed = model.ranks, model.routing.load().sum(0).tolist()
    spread = ranks.spread
    if spread is not None:
        layers = Shard(model.config, ranks.place).mixture_layers
        held = {expert for layer in layers for expert in spread.map.experts_on(spread.rank, layer)}
        computed = spread.computed(layers).sum(0).tolist()
        rows = {expert: count for expert, count in enumerate(computed) if count or expert in held}
        return ExpertRows(
            ranks.place.rank, tuple(rows), tuple(rows.values()), tuple(routed), tuple(spread.exchange.sent_to)
        )
    if ranks.place.ranks > 1:
        return None
    return ExpertRows(0, tuple(range(len(routed))), tuple(routed), tuple(routed))
