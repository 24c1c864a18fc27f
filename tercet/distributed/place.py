"""Where a rank stands in its group. Pure.

    rank = (stage * data + data_rank) * tensor + tensor_rank

so that the ranks that talk most, those of one tensor group, follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tercet.transfer.memory.layout import window


@dataclass(frozen=True)
class Place:
    rank: int = 0
    tensor: int = 1  # degrees, as a spec's `parallelism` has them
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        return self.rank // (self.tensor * self.data)

    @property
    def is_first(self) -> bool:
        """Whether it begins with token ids; else with the hidden states of the stage before."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with logits."""
        return self.stage == self.pipeline - 1

    @property
    def draws(self) -> bool:
        """Whether it draws the tokens of its replica."""
        return self.is_last and self.tensor_rank == 0

    @property
    def tensor_group(self) -> range:
        """The ranks that share each layer's heads and columns."""
        first = self.rank - self.tensor_rank
        return range(first, first + self.tensor)

    @property
    def stage_group(self) -> range:
        """The ranks that share each layer's experts."""
        size = self.tensor * self.data
        return range(self.stage * size, (self.stage + 1) * size)

    def of(self, rank: int) -> Place:
        """Another rank's place in the same group."""
        return replace(self, rank=rank)

    def at_stage(self, stage: int) -> int:
        """The rank that holds the same share of another stage."""
        return self.rank + (stage - self.stage) * self.tensor * self.data

    def layers(self, count: int) -> range:
        """Those of a model's `count` that are here."""
        return window(count, self.stage, self.pipeline)


def share(count: int, rank: int, size: int) -> range:
    """The rank's part of `count` things in a row, as even as they go."""
    return range(rank * count // size, (rank + 1) * count // size)
