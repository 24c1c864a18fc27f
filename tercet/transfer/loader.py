"""Make a parcel of a write: choose how its units travel, gather, convert and digest them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from tercet.transfer.digest import digests_of
from tercet.transfer.layout import Pair, Run, Units, plan
from tercet.transfer.messages import Data
from tercet.transfer.outbound import Write
from tercet.transfer.pack import Bytes, Memory, convert, gather, packed_shape, scatter
from tercet.transfer.region import Region
from tercet.transfer.transport import Parcel, Transport


class Loader:
    """Stateless but for its region, so every link's thread uses the same one."""

    def __init__(self, region: Region, integrity: bool) -> None:
        self._memory = region.view
        self._integrity = integrity

    def parcel(self, transport: Transport, pair: Pair, write: Write) -> Parcel:
        layers = range(write.layer, write.layer + write.layers)
        runs = [] if pair.converts else plan(pair, layers, write.src, write.dst)
        packs = self._packs(transport, pair, runs)
        packed = self._packed(pair, layers, write.src) if packs or self._integrity else None
        digests = self._digests(pair, write, packed) if packed is not None and self._integrity else b""
        data = Data(write.ticket, write.layer, write.layers, write.index, write.src.count, write.resend, packs, digests)
        if not packs or packed is None:
            return Parcel(data, self._memory, runs)
        into = partial(_scatter_all, pair, layers, write.dst, packed)
        return Parcel(data, packed.reshape(-1).data, [Run(0, 0, packed.nbytes)], into)

    def _packs(self, transport: Transport, pair: Pair, runs: Sequence[Run]) -> bool:
        """Whether units travel packed: if many small runs would cost more than gathering them, and where the digest
        has gathered them anyway, unless that would cost a mapped peer another copy."""
        if not transport.packs or pair.converts:
            return transport.packs
        if self._integrity and not transport.one_sided:
            return True
        return sum(run.length for run in runs) < transport.pack_below * len(runs)

    def _packed(self, pair: Pair, layers: range, units: Units) -> Bytes:
        """[layers, *packed_shape] in the destination's dtype."""
        packed = np.empty((len(layers), *packed_shape(pair, units.count)), dtype=np.uint8)
        for number, layer in enumerate(layers):
            where = (pair.src, self._memory, layer, units, pair.unit, pair.heads)
            if pair.converts:
                packed[number] = convert(pair, gather(*where))
            else:
                gather(*where, out=packed[number])
        return packed

    def _digests(self, pair: Pair, write: Write, packed: Bytes) -> bytes:
        found = [
            digests_of(packed[number], write.layer + number, pair.heads.start, write.index)
            for number in range(write.layers)
        ]
        return np.stack(found).astype("<u8").tobytes()


def _scatter_all(pair: Pair, layers: range, units: Units, packed: Bytes, memory: Memory) -> None:
    for number, layer in enumerate(layers):
        scatter(pair.dst, memory, layer, units, pair.unit, pair.heads, packed[number])
