"""Parcels of KV in a GPU's memory, and what has landed there: as parcels.py and lander.py for host memory. Bytes move
from cache to cache as they are, so nothing is packed; digests are computed where the bytes lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tercet.errors import ProtocolViolation
from tercet.transfer.links.channel import Channel
from tercet.transfer.memory.device import DeviceRegion, DeviceUnits
from tercet.transfer.memory.layout import Pair, runs_of
from tercet.transfer.protocol.arrivals import Landing
from tercet.transfer.protocol.incoming import Terms
from tercet.transfer.protocol.messages import Data
from tercet.transfer.protocol.outgoing import Write
from tercet.transfer.transports.contract import Inlet, Parcel, Transport, library_errors


class DeviceLoader:
    """For one link's thread."""

    def __init__(self, region: DeviceRegion, integrity: bool) -> None:
        self._region = region
        with library_errors("no stream for digests on the GPU"):
            self._stream = region.gpu.stream() if integrity else None

    def parcel(self, transport: Transport, pair: Pair, write: Write) -> Parcel:
        layers, units = range(write.layer, write.layer + write.layers), write.src
        computed, digests = self._region.computed(layers, units.blocks), b""
        if self._stream is not None:
            with library_errors("the digests of KV on the GPU failed"):
                self._stream.wait(computed)
                with self._stream.using():
                    found = DeviceUnits(self._region, layers, units, pair.unit, pair.heads).digests(write.index)
                digests = self._stream.fetch(found).numpy().astype("<i8").tobytes()
        data = Data(write.ticket, write.layer, write.layers, write.index, units.count, write.resend, False, digests)
        return Parcel(data, self._region.memory, runs_of(pair, layers, units, write.dst), after=computed)


class DeviceLander:
    """For one link's thread."""

    def __init__(self, region: DeviceRegion, integrity: bool) -> None:
        self._region = region
        self._integrity = integrity
        with library_errors("no stream for digests on the GPU"):
            self._stream = region.gpu.stream()

    def land(
        self, terms: Terms, inlet: Inlet, channel: Channel, data: Data, payload: int, landing: Landing
    ) -> NDArray[np.bool_]:
        """-> for each (layer, unit) of the DATA, whether its digest matches. Raises PeerDown, ProtocolViolation."""
        pair, layers = terms.pair, range(data.layer, data.layer + data.layers)
        inlet.land(channel, payload, ())
        with library_errors("the KV that has landed on the GPU cannot be verified"), self._stream.using():
            if landing.tail is not None:
                DeviceUnits(self._region, layers, landing.tail, pair.unit, pair.heads).zero()
            good = self._verified(DeviceUnits(self._region, layers, landing.units, pair.unit, pair.heads), data, pair)
            self._stream.synchronise()
        return good

    def _verified(self, units: DeviceUnits, data: Data, pair: Pair) -> NDArray[np.bool_]:
        shape = (data.layers, data.count, len(pair.heads))
        if not self._integrity:
            return np.ones(shape[:2], dtype=bool)
        expected = np.frombuffer(data.digests, dtype=np.uint8)
        if expected.size != 8 * np.prod(shape):
            raise ProtocolViolation(f"DATA carries {expected.size} bytes of digests, not {8 * np.prod(shape)}")
        found = self._stream.fetch(units.digests(data.index)).numpy()
        matches: NDArray[np.bool_] = (found == expected.view("<i8").reshape(shape)).all(axis=-1)
        return matches
