"""Make a parcel of a write: choose how its units travel, gather, convert and digest them."""

from __future__ import annotations

from collections.abc import Sequence

from tercet.transfer.digest import digests_of
from tercet.transfer.layout import Pair, Run, plan
from tercet.transfer.messages import Data
from tercet.transfer.outbound import Write
from tercet.transfer.pack import Bytes, Cells, Memory, Scratch, convert, pieces_of
from tercet.transfer.region import Region
from tercet.transfer.transport import Parcel, Transport


class Loader:
    """For one link's thread: a parcel is good until the next one is made."""

    def __init__(self, region: Region, integrity: bool) -> None:
        self._memory = region.view
        self._integrity = integrity
        self._scratch = Scratch()

    def parcel(self, transport: Transport, pair: Pair, write: Write) -> Parcel:
        layers, units = range(write.layer, write.layer + write.layers), write.src
        cells = Cells(pair.src, self._memory, layers, units, pair.unit, pair.heads)
        pieces = cells.pieces() if self._integrity and not pair.converts else None
        gathers = self._integrity and pieces is None
        runs = [] if pair.converts else plan(pair, layers, units, write.dst)
        packs = _packs(transport, pair, runs, gathers)
        packed = self._packed(pair, cells) if packs or gathers else None
        digests = b""
        if self._integrity:
            found = pieces if packed is None else pieces_of(packed)
            assert found is not None
            granted = range(write.index, write.index + units.count)
            digests = digests_of(found, layers, granted, pair.heads).astype("<u8").tobytes()
        data = Data(write.ticket, write.layer, write.layers, write.index, units.count, write.resend, packs, digests)
        if not packs or packed is None:
            return Parcel(data, self._memory, runs)

        def scatter(memory: Memory) -> None:
            Cells(pair.dst, memory, layers, write.dst, pair.unit, pair.heads).scatter(packed)

        return Parcel(data, packed.reshape(-1).data, [Run(0, 0, packed.nbytes)], scatter)

    def _packed(self, pair: Pair, cells: Cells) -> Bytes:
        """The units, gathered, in the destination's dtype."""
        packed = cells.gather(self._scratch.take(cells.packed_shape))
        return convert(pair, packed) if pair.converts else packed


def _packs(transport: Transport, pair: Pair, runs: Sequence[Run], gathers: bool) -> bool:
    """Whether units travel packed: if many small runs would cost more than gathering them, and where a digest has to
    gather them anyway, unless that would cost a mapped peer another copy."""
    if not transport.packs or pair.converts:
        return transport.packs
    if gathers and not transport.one_sided:
        return True
    return sum(run.length for run in runs) < transport.pack_below * len(runs)
