"""One HTTP/2 connection of a server: grpclib's, with what it lets through bounded.

Whatever bytes come, this connection ends at worst: headers are kept as bytes, so that none fails to decode, a
fault of the libraries below is counted, and a client that floods (pings, resets, tiny data frames) or never reads is
disconnected.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, EventsProcessor
from grpclib.protocol import Connection as StreamTable
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from tercet.errors import TercetError
from tercet.wire.connections import ConnectionPhase, Guard

WINDOW = 2**16 - 1  # bytes that a client may send ahead of what is read, as HTTP/2 begins with
MOST_STREAMS = 2**31 - 1  # that HTTP/2 can say
MOST_HEAD = 16 * 1024  # bytes of a call's metadata, as HPACK counts them
MOST_UNREAD = 4 * 1024 * 1024  # bytes of answers to a client that does not read
BURST = 400.0  # frames that ask for nothing, at once
RATE = 200.0  # and a second
EARNED = 4.0  # and for each message, either way
REFUSED = 4.0  # that a call costs which is turned away
CALL_S = 600e-6  # of the processor, that a call takes at least
DATA_BYTES = 32.0  # that pay for a frame; the smallest commands to a worker have more
PING_S = 10.0  # a client with a call under way is asked so often whether it lives
PING_ANSWER_S = 20.0  # and is gone if it has not answered for so long

log = logging.getLogger(__name__)


class _Connection(H2Connection):
    MAX_CLOSED_STREAMS = 1024  # remembered, so that late frames of theirs are known
    frames = 0  # that have come; not each has an event

    def _receive_frame(self, frame: Any) -> list[Event]:
        self.frames += 1
        return super()._receive_frame(frame)


class _UntilClosed:
    """A transport to which nothing is written once it closes: calls that end then still have a last word."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


class Http2(asyncio.Protocol):
    """`handler` is told of streams; `guard` of how the connection ends."""

    opens = ConnectionPhase.HEAD
    at_first = 256  # an opening; 25 calls fit in as well

    def __init__(self, handler: AbstractHandler, guard: Guard, max_streams: int) -> None:
        self._handler = handler
        self._guard = guard
        self._max_streams = min(max_streams, MOST_STREAMS)
        self._allowance, self._counted_at = BURST, 0.0
        self._frames = 0  # that are paid for
        self._h2: _Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        open_part = cast("asyncio.Transport", _UntilClosed(self._transport))
        self._h2 = h2 = _Connection(_H2_CONFIG)
        initial = {SettingCodes.MAX_CONCURRENT_STREAMS: self._max_streams, SettingCodes.MAX_HEADER_LIST_SIZE: MOST_HEAD}
        h2.local_settings = Settings(client=False, initial_values=initial)
        h2.decoder.max_header_list_size = MOST_HEAD
        h2.initiate_connection()
        self.streams = StreamTable(h2, open_part, config=_CONFIG)
        self.streams.flush()
        self.streams.initialize()
        self._events = EventsProcessor(self._handler, self.streams)

    def data_received(self, data: bytes) -> None:
        try:
            self._feed(data)
        except ProtocolError as error:
            self._end("protocol_error", error)
        except Exception as error:  # noqa: BLE001  # a boundary: whatever the libraries below raise ends this connection alone
            self._end("protocol_error", error)
            log.warning("an HTTP/2 connection was closed: %s", type(error).__name__)

    def earn(self, frames: float = EARNED) -> None:
        """A message has passed, or what pays for `frames`: the client may send more that ask for nothing."""
        self._allowance = min(BURST, self._allowance + frames)

    def refused(self) -> None:
        """A call was refused; it costs, so that a client cannot send refused calls without limit."""
        self._allowance -= REFUSED

    def farewell(self, error: TercetError | None) -> bytes:
        """GOAWAY: the client may connect again."""
        if self._h2 is None:
            return b""
        with suppress(ProtocolError):  # it is closed already
            self._h2.close_connection()
        return self._h2.data_to_send()

    def pause_writing(self) -> None:
        self.streams.pause_writing()

    def resume_writing(self) -> None:
        self.streams.resume_writing()

    def connection_lost(self, error: BaseException | None) -> None:
        self._events.close("Connection lost")

    def _feed(self, data: bytes) -> None:
        assert self._h2 is not None
        events = self.streams.feed(data)
        self._spend(self._h2.frames)
        self.streams.flush()
        for event in events:
            self._take(event)
        self.streams.flush()
        if self._allowance < 0:
            self._end("flood", None)
        elif self._transport.get_write_buffer_size() > MOST_UNREAD:
            self._end("does_not_read", None)

    def _take(self, event: Event) -> None:
        if isinstance(event, RemoteSettingsChanged):
            self._guard.opened()
        elif isinstance(event, RequestReceived):
            self._guard.begun(CALL_S)
        self.earn(_earned_by(event))
        empty = isinstance(event, DataReceived) and not event.flow_controlled_length
        if not empty and event.__class__ in self._events.processors:  # the others ask for nothing, or are unknown
            self._events.process(event)

    def _spend(self, frames: int) -> None:
        """For all `frames` of this connection."""
        now = asyncio.get_running_loop().time()
        refilled = min(BURST, self._allowance + (now - self._counted_at) * RATE)
        self._allowance = refilled - (frames - self._frames)
        self._counted_at, self._frames = now, frames

    def _end(self, reason: str, error: Exception | None) -> None:
        if self._transport.is_closing():
            return
        log.debug("an HTTP/2 connection ends: %s", reason, exc_info=error)
        self._guard.fault(reason)
        self.streams.flush()  # GOAWAY, if h2 has made one
        transport = self._transport
        self._events.close(reason)
        if transport.get_write_buffer_size():
            transport.abort()


def _earned_by(event: Event) -> float:
    """Every frame costs 1. A call's beginning and end give it back, and data by its size."""
    if isinstance(event, DataReceived):
        return len(event.data) / DATA_BYTES + (event.stream_ended is not None)
    return float(isinstance(event, (RequestReceived, TrailersReceived)))


_H2_CONFIG = H2Configuration(
    client_side=False,
    header_encoding=None,
    validate_inbound_headers=False,  # those that matter are read by name, in one place
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)
_CONFIG = Configuration(
    _keepalive_time=PING_S,
    _keepalive_timeout=PING_ANSWER_S,
    _http2_max_pings_without_data=0,  # no bound
    _http2_min_sent_ping_interval_without_data=PING_S / 2,
    http2_connection_window_size=WINDOW,
    http2_stream_window_size=WINDOW,
).__for_server__()
