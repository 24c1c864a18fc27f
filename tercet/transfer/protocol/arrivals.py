"""Which units of a ticket have landed, are landing, or were asked for again. No messages, no clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.transfer.memory.layout import Pair, Units
from tercet.transfer.protocol.messages import Data


@dataclass(frozen=True)
class Landing:
    """Where the units of a DATA go, and which units after the prompt's last one are to be zeroed."""

    units: Units
    tail: Units | None


class Arrivals:
    """The granted units of one ticket, [layers, units], and the destination blocks that hold them."""

    def __init__(self, pair: Pair, blocks: tuple[int, ...], num_units: int) -> None:
        self._first_layer = pair.layers.start
        self._per_block = pair.dst.block_size // pair.unit
        self._blocks = blocks
        self._landed = np.zeros((len(pair.layers), num_units), dtype=bool)
        self._landing = self._landed.copy()
        self._asked: dict[tuple[int, int], int] = {}  # (layer, unit) -> number of its last RESEND

    @property
    def all_landed(self) -> bool:
        return bool(self._landed.all())

    @property
    def any_landing(self) -> bool:
        return bool(self._landing.any())

    @property
    def num_landed(self) -> int:
        """How many of `num_cells` have landed and are verified."""
        return int(self._landed.sum())

    @property
    def num_cells(self) -> int:
        """Units of all layers together."""
        return self._landed.size

    def begin(self, data: Data) -> Landing | None:
        """Where the bytes of a DATA go. None if it names units that were not granted, that have landed or are landing,
        or that were asked for again: of those only the answer to the RESEND is taken, not a late copy."""
        cells, size = self._cells(data), data.layers * data.count
        if size < 1 or self._landed[cells].size != size:
            return None
        asked = {number for at, number in self._asked.items() if _within(at, data)} or {0}
        if self._landed[cells].any() or self._landing[cells].any() or asked != {data.resend}:
            return None
        self._landing[cells] = True
        return self._landing_of(data)

    def end(self, data: Data, good: NDArray[np.bool_] | None) -> None:
        """good: which of its [layers, units] are verified; None: the landing was cut off."""
        cells = self._cells(data)
        self._landing[cells] = False
        if good is not None:
            self._landed[cells] = good

    def ask_again(self, layer: int, unit: int, number: int) -> None:
        self._asked[layer, unit] = number

    def verified_blocks(self) -> int:
        """How many destination blocks, from the first on, hold their units in every layer."""
        whole = self._landed.all(axis=0)
        units = whole.size if whole.all() else int(np.argmin(whole))
        return units // self._per_block

    def _cells(self, data: Data) -> tuple[slice, slice]:
        """The part of [layers, units] that a DATA names; out of range it is empty or too small."""
        first = data.layer - self._first_layer
        if first < 0:
            return slice(0, 0), slice(0, 0)
        return slice(first, first + data.layers), slice(data.index, data.index + data.count)

    def _landing_of(self, data: Data) -> Landing:
        per_block, end = self._per_block, data.index + data.count
        blocks = self._blocks[data.index // per_block : -(-end // per_block)]
        units = Units(blocks, data.index % per_block, data.count)
        empty = -end % per_block if end == self._landed.shape[1] else 0
        return Landing(units, Units(blocks[-1:], per_block - empty, empty) if empty else None)


def _within(at: tuple[int, int], data: Data) -> bool:
    layer, unit = at
    return data.layer <= layer < data.layer + data.layers and data.index <= unit < data.index + data.count
