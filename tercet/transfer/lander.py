"""Take the bytes of a DATA in: place them, verify them, zero what lies behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tercet.errors import ProtocolViolation
from tercet.transfer.arrivals import Landing
from tercet.transfer.channel import Channel
from tercet.transfer.digest import digests_of
from tercet.transfer.inbound import Terms
from tercet.transfer.layout import Pair, Units, plan
from tercet.transfer.messages import Data
from tercet.transfer.pack import Bytes, gather, packed_shape, scatter, zero
from tercet.transfer.region import Region
from tercet.transfer.transport import Inlet


class Lander:
    """Stateless but for its region, so every link's thread uses the same one."""

    def __init__(self, region: Region, integrity: bool) -> None:
        self._memory = region.view
        self._integrity = integrity

    def land(
        self, terms: Terms, inlet: Inlet, channel: Channel, data: Data, payload: int, landing: Landing
    ) -> NDArray[np.bool_]:
        """-> whether each (layer, unit) of the DATA stands with its digest. Raises PeerDown, ProtocolViolation."""
        pair, units = terms.pair, landing.units
        layers = range(data.layer, data.layer + data.layers)
        # What a one-sided writer has placed in our memory is looked at where it lies.
        packed = self._staging(pair, data) if data.packed and not terms.one_sided else None
        if packed is not None:
            inlet.land(channel, payload, [packed.reshape(-1).data])
        else:
            inlet.land(channel, payload, [] if terms.one_sided else self._views(pair, layers, units))
        good = self._verified(pair, data, units, packed)
        for number, layer in enumerate(layers):
            if packed is not None:
                scatter(pair.dst, self._memory, layer, units, pair.unit, pair.heads, packed[number])
            if landing.tail is not None:
                zero(pair.dst, self._memory, layer, landing.tail, pair.unit)
        return good

    def _staging(self, pair: Pair, data: Data) -> Bytes:
        return np.empty((data.layers, *packed_shape(pair, data.count)), dtype=np.uint8)

    def _views(self, pair: Pair, layers: range, units: Units) -> Sequence[memoryview]:
        """The destination in the order of the stream. Which source blocks the bytes come from has no say in that."""
        if pair.converts:
            raise ProtocolViolation("bytes of another dtype must come packed")
        source = Units(range(units.count), 0, units.count)
        return [self._memory[run.dst : run.dst + run.length] for run in plan(pair.streamed, layers, source, units)]

    def _verified(self, pair: Pair, data: Data, units: Units, packed: Bytes | None) -> NDArray[np.bool_]:
        if not self._integrity:
            return np.ones((data.layers, data.count), dtype=bool)
        shape = (data.layers, data.count, len(pair.heads))
        if len(data.digests) != 8 * math.prod(shape):
            raise ProtocolViolation(f"DATA carries {len(data.digests)} bytes of digests, not {8 * math.prod(shape)}")
        expected = np.frombuffer(data.digests, dtype="<u8").reshape(shape)
        good = np.empty(shape[:2], dtype=bool)
        for number in range(data.layers):
            layer = data.layer + number
            stands = packed[number] if packed is not None else self._gather(pair, layer, units)
            found = digests_of(stands, layer, pair.heads.start, data.index)
            good[number] = (found == expected[number]).all(axis=-1)
        return good

    def _gather(self, pair: Pair, layer: int, units: Units) -> Bytes:
        return gather(pair.dst, self._memory, layer, units, pair.unit, pair.heads)
