"""Land the bytes of a DATA: place them, verify them, zero the rest of the prompt's last block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.errors import ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.memory.device import DeviceRegion, KvRegion
from tercet.transfer.memory.digest import digests_in_place, digests_of
from tercet.transfer.memory.layout import Pair, Units, runs_of
from tercet.transfer.memory.pack import Bytes, Cells, Memory, Scratch, pieces_of
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.on_device import DeviceLander
from tercet.transfer.protocol.arrivals import Landing
from tercet.transfer.protocol.incoming import Terms
from tercet.transfer.protocol.messages import Data
from tercet.transfer.transports.contract import Inlet


def lander_of(region: KvRegion, integrity: bool) -> Lander | DeviceLander:
    return DeviceLander(region, integrity) if isinstance(region, DeviceRegion) else Lander(region, integrity)


class Lander:
    """For one link's thread."""

    def __init__(self, region: Region, integrity: bool) -> None:
        self._memory = region.view
        self._integrity = integrity
        self._scratch = Scratch()

    def land(
        self, terms: Terms, inlet: Inlet, channel: Channel, data: Data, payload: int, landing: Landing
    ) -> NDArray[np.bool_]:
        """-> for each (layer, unit) of the DATA, whether its digest matches. Raises PeerDown, ProtocolViolation."""
        pair, layers = terms.pair, range(data.layer, data.layer + data.layers)
        cells = Cells(pair.dst, self._memory, layers, landing.units, pair.unit, pair.heads)
        # What a one-sided writer has placed in our memory is verified in place.
        packed = cells.packed(self._scratch) if data.packed and not terms.one_sided else None
        if packed is not None:
            inlet.land(channel, payload, [packed.reshape(-1).data])
        else:
            inlet.land(channel, payload, [] if terms.one_sided else self._views(pair, layers, landing.units))
        good = self._verified(pair, data, cells, packed)
        if packed is not None:
            cells.scatter(packed)
        if landing.tail is not None:
            Cells(pair.dst, self._memory, layers, landing.tail, pair.unit, pair.heads).zero()
        return good

    def _views(self, pair: Pair, layers: range, units: Units) -> Sequence[Memory]:
        """The destination in the order of the stream, which does not depend on the source's blocks."""
        if pair.converts:
            raise ProtocolViolation("bytes of another dtype must come packed")
        source = Units(range(units.count), 0, units.count)
        return [self._memory[at : at + size] for _, at, size in runs_of(pair.streamed, layers, source, units)]

    def _verified(self, pair: Pair, data: Data, cells: Cells, packed: Bytes | None) -> NDArray[np.bool_]:
        layers, units = range(data.layer, data.layer + data.layers), range(data.index, data.index + data.count)
        if not self._integrity:
            return np.ones((len(layers), len(units)), dtype=bool)
        shape = (len(layers), len(units), len(pair.heads))
        expected = np.frombuffer(data.digests, dtype=np.uint8)
        if expected.size != 8 * np.prod(shape):
            raise ProtocolViolation(f"DATA carries {expected.size} bytes of digests, not {8 * np.prod(shape)}")
        if packed is not None:
            found = digests_of(pieces_of(packed), layers, units, pair.heads)
        else:
            found = digests_in_place(cells, self._scratch, layers, units, pair.heads)
        matches: NDArray[np.bool_] = (found == expected.view("<u8").reshape(shape)).all(axis=-1)
        return matches
