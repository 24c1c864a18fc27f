"""What a tower writes about a picture: sixteen embeddings, each of which says one thing of the scene, or nothing.

They begin as words of the language model and learn to make it answer; then the tower learns to write them.

N pictures   T tokens of each   E hidden size   V values of a property
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .pictures import COLOURS, DIGITS, NUMBERS, PLACES, SEVERAL, SHAPES, Scene

VALUES: dict[str, tuple[str, ...]] = {  # property of a scene -> what it may be
    "thing": (*SHAPES, *DIGITS),
    "colour": tuple(COLOURS),
    "number": NUMBERS,
    "place": (*PLACES, SEVERAL),
}
SLOTS = (  # a property that is written there, or a word that is always the same
    *("The", "picture", "shows", "number", "colour", "thing", "in", "the"),
    *("place", "place", ":", "number", "colour", "thing", "place", "thing"),
)


class Notes(nn.Module):
    """The embeddings, in units of `scale`, the standard deviation of the language model's own."""

    def __init__(self, embedding: Callable[[str], Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        rows = [torch.stack([embedding(value) for value in VALUES.get(slot, (slot,))]) / scale for slot in SLOTS]
        self.tables = nn.ParameterList(rows)  # [V, E] of each slot

    def forward(self, scenes: Sequence[Scene]) -> Tensor:
        """-> [N, T, E], as the language model takes them."""
        said = [table[rows] for table, rows in zip(self.tables, self._rows(scenes), strict=True)]
        return torch.stack(said, 1) * self.scale

    def loss(self, written: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, float]]:
        """written: [N, T, E], by a tower. -> how far it is from the notes, and the share of each property that would be
        read rightly, by what is nearest."""
        wanted, total = self(scenes), torch.zeros(())
        right: dict[str, list[float]] = {}
        total = ((written - wanted) / self.scale).square().mean((0, 2)).sum()
        for slot, table, rows, at in zip(SLOTS, self.tables, self._rows(scenes), written.unbind(1), strict=True):
            if slot not in VALUES:
                continue
            near = -(at.unsqueeze(1) / self.scale - table).square().mean(-1)  # [N, V]
            total = total + 0.3 * functional.cross_entropy(4 * near, rows)
            right.setdefault(slot, []).append((near.argmax(1) == rows).float().mean().item())
        return total, {slot: min(shares) for slot, shares in right.items()}

    def _rows(self, scenes: Sequence[Scene]) -> list[Tensor]:
        """-> of each slot [N], which row of its table says it."""
        return [
            torch.tensor([VALUES[slot].index(getattr(scene, slot)) if slot in VALUES else 0 for scene in scenes])
            for slot in SLOTS
        ]
