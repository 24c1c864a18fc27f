"""Where the movers of a worker's ranks listen, as one opaque string to everybody else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from tercet.errors import PeerMismatch
from tercet.transfer.memory.layout import KvLayout, Pair, window
from tercet.transfer.transports.contract import Endpoint


@dataclass(frozen=True)
class GroupEndpoint:
    """Of a worker of one rank it is that rank's `Endpoint`."""

    tensor: int  # ranks that share a layer's heads
    pipeline: int  # stages
    ranks: tuple[str, ...]  # an encoded Endpoint each; rank = stage * tensor + tensor rank

    def encode(self) -> str:
        return self.ranks[0] if len(self.ranks) == 1 else json.dumps([self.tensor, self.pipeline, self.ranks])

    @classmethod
    def decode(cls, text: str) -> GroupEndpoint:
        """Raises PeerMismatch."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise PeerMismatch(f"no transfer endpoint: {text!r:.80}") from error
        match found:
            case [int(tensor), int(pipeline), [*ranks]] if len(ranks) == tensor * pipeline:
                return cls(tensor, pipeline, tuple(map(str, ranks)))
        Endpoint.decode(text)
        return cls(1, 1, (text,))

    @property
    def worker_id(self) -> str:
        return Endpoint.decode(self.ranks[0]).worker_id

    def meeting(self, src: KvLayout) -> list[str]:
        """The endpoints of those ranks that need layers or heads from the rank of this layout."""
        places = ((stage, rank) for stage in range(self.pipeline) for rank in range(self.tensor))
        layouts = [_at(src, stage, self.pipeline, rank, self.tensor) for stage, rank in places]
        return [at for at, dst in zip(self.ranks, layouts, strict=True) if meets(src, dst)]


def meets(src: KvLayout, dst: KvLayout) -> bool:
    """Whether anything goes from one to the other."""
    try:
        Pair(src, dst)
    except PeerMismatch:
        return False
    return True


def _at(model: KvLayout, stage: int, stages: int, rank: int, ranks: int) -> KvLayout:
    """The same model's layout at another place."""
    layers = window(model.model_layers, stage, stages)
    return replace(model, tp_size=ranks, tp_rank=rank, first_layer=layers.start, layers=len(layers))
