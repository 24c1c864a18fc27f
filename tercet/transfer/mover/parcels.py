"""Make a parcel of a write: choose how its units travel, gather, convert and digest them."""

from __future__ import annotations

from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.digest import digests_in_place, digests_of
from tercet.transfer.memory.layout import Pair, runs_of
from tercet.transfer.memory.pack import Bytes, Cells, Memory, Scratch, convert, pieces_of
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.on_device import DeviceLoader
from tercet.transfer.protocol.messages import Data
from tercet.transfer.protocol.outgoing import Write
from tercet.transfer.transports.contract import Parcel, Transport


def loader_of(region: KvRegion, integrity: bool) -> Loader | DeviceLoader:
    return DeviceLoader(region, integrity) if isinstance(region, DeviceRegion) else Loader(region, integrity)


class Loader:
    """For one link's thread: a parcel is good until the next one is made."""

    def __init__(self, region: Region, integrity: bool) -> None:
        self._memory = region.view
        self._integrity = integrity
        self._scratch = Scratch()

    def parcel(self, transport: Transport, pair: Pair, write: Write) -> Parcel:
        layers, units = range(write.layer, write.layer + write.layers), write.src
        cells = Cells(pair.src, self._memory, layers, units, pair.unit, pair.heads)
        packed = self._packed(pair, cells) if self._packs(transport, pair, cells) else None
        digests, where = b"", (layers, range(write.index, write.index + units.count), pair.heads)
        if self._integrity and packed is not None:
            digests = digests_of(pieces_of(packed), *where).astype("<u8").tobytes()
        elif self._integrity:
            digests = digests_in_place(cells, self._scratch, *where).astype("<u8").tobytes()
        packs = packed is not None
        data = Data(write.ticket, write.layer, write.layers, write.index, units.count, write.resend, packs, digests)
        if packed is None:
            return Parcel(data, self._memory, runs_of(pair, layers, units, write.dst))

        def scatter(memory: Memory) -> None:
            Cells(pair.dst, memory, layers, write.dst, pair.unit, pair.heads).scatter(packed)

        return Parcel(data, packed.reshape(-1).data, [(0, 0, packed.nbytes)], scatter)

    def _packs(self, transport: Transport, pair: Pair, cells: Cells) -> bool:
        """Whether units travel packed: if many small runs would cost more than gathering them, or if a digest must
        gather them anyway, except for a one-sided transport, which would need another copy."""
        if not transport.packs or pair.converts:
            return transport.packs
        if self._integrity and not cells.contiguous and not transport.one_sided:
            return True
        return pair.run_bytes < transport.pack_below

    def _packed(self, pair: Pair, cells: Cells) -> Bytes:
        """The units, gathered, in the destination's dtype."""
        packed = cells.gather(self._scratch)
        return convert(pair, packed) if pair.converts else packed
