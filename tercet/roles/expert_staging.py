"""Memory by which weights of experts cross between the ranks of a group, laid out as KV is
(`transfer/memory/layout.py`), so that the mover carries them as it does KV: a chunk of an expert's bytes is a block of
one token. The bytes are those that the kernels keep (`kernels/moe.py:Experts.weights`), so nothing is packed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tercet.kernels.moe import Experts
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region

CHUNK = 1 << 20  # bytes, at most
MOST_BYTES = 64 << 20  # of the memory, if an expert fits in


def format_of(experts: Experts) -> str:
    """Of the bytes of an expert: ranks can exchange them if it is the same."""
    return str([(str(weight.dtype), [*weight.shape[1:]]) for weight in experts.weights])


class ExpertStaging:
    """Room for some experts, at places 0, 1 ... Not thread-safe."""

    def __init__(self, like: Experts) -> None:
        num_bytes = sum(weight[0].nbytes for weight in like.weights)  # of an expert
        self._chunks = -(-num_bytes // CHUNK)
        chunk = -(-num_bytes // self._chunks)
        self.room = max(1, MOST_BYTES // (self._chunks * chunk))  # experts
        self.memory = Region(KvLayout(1, self.room * self._chunks, 1, 1, chunk, "int8", parts=1))
        flat = torch.frombuffer(self.memory.view, dtype=torch.uint8)
        self._places = flat.view(self.room, self._chunks * chunk)

    def blocks(self, experts: int) -> list[int]:
        """Of the first places."""
        return [*range(experts * self._chunks)]

    def write(self, place: int, weights: Sequence[Tensor]) -> None:
        """weights: of one expert."""
        for part, weight in self._parts(place, weights):
            part.copy_(weight)

    def read(self, place: int, into: Sequence[Tensor]) -> None:
        for part, weight in self._parts(place, into):
            weight.copy_(part)

    def _parts(self, place: int, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """-> where each tensor's bytes lie, and these bytes."""
        begin = 0
        for weight in weights:
            flat = weight.view(-1).view(torch.uint8)  # raises where it would have to copy
            yield self._places[place, begin : begin + len(flat)], flat
            begin += len(flat)
