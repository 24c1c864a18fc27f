"""Where the movers of a worker's ranks listen, as one opaque string to everybody else."""

from __future__ import annotations

import itertools
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
    data: int  # replicas of each stage, with KV of their own
    # An encoded Endpoint each, empty for one that is lost; rank = (stage * data + replica) * tensor + tensor rank.
    ranks: tuple[str, ...]

    def encode(self) -> str:
        return (
            self.ranks[0] if len(self.ranks) == 1 else json.dumps([self.tensor, self.pipeline, self.data, self.ranks])
        )

    @classmethod
    def decode(cls, text: str) -> GroupEndpoint:
        """Raises PeerMismatch."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise PeerMismatch(f"no transfer endpoint: {text!r:.80}") from error
        match found:
            case [int(tensor), int(pipeline), int(data), [*ranks]] if len(ranks) == tensor * pipeline * data:
                return cls(tensor, pipeline, data, tuple(map(str, ranks)))
        Endpoint.decode(text)
        return cls(1, 1, 1, (text,))

    @property
    def worker_id(self) -> str:
        return Endpoint.decode(self.ranks[0]).worker_id

    def meeting(self, src: KvLayout, replica: int) -> list[str]:
        """The endpoints of those ranks of a replica that need layers or heads from the rank of this layout."""
        return [
            self.ranks[number]
            for number, (stage, rank) in self._of(replica).items()
            if meets(src, _at(src, stage, self.pipeline, rank, self.tensor))
        ]

    def stands(self, replica: int) -> bool:
        """Whether none of its ranks is lost."""
        return all(self.ranks[number] for number in self._of(replica))

    def _of(self, replica: int) -> dict[int, tuple[int, int]]:
        """Its ranks -> stage, and rank there."""
        places = itertools.product(range(self.pipeline), range(self.tensor))
        return {(stage * self.data + replica) * self.tensor + rank: (stage, rank) for stage, rank in places}


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
