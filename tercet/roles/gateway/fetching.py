"""Fetches images that a client names by their addresses.

fetch(url) ──> a place among max_fetches ──> checked, connected, read ──> bytes
                                               ^        └─ redirect ─┐
                                               └─────────────────────┘
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractResolver
from yarl import URL

from tercet.errors import ImageNotFetched
from tercet.metrics import Metrics
from tercet.models.vision.files import KINDS
from tercet.roles.gateway.admission import Admission
from tercet.roles.gateway.fetch_rules import AllowedDomains, NotAllowed, is_public, parsed
from tercet.spec import GatewayImagesSpec

REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {
    hdrs.ACCEPT: ", ".join(f"image/{kind.lower()}" for kind in KINDS),
    hdrs.ACCEPT_ENCODING: "identity",  # what is small when packed may be of any size
    hdrs.USER_AGENT: "tercet",
}
Count = Callable[[int], None]  # is told of each bytes that came, and may raise


class _Failed(Exception):
    """Why there is no image, in words for the client. result: as the metrics have it."""

    def __init__(self, result: str, told: str) -> None:
        super().__init__(told)
        self.result = result


class _NotPublic(OSError):
    pass


class Fetcher:
    """Event loop only. `resolver` and `public` are for tests."""

    def __init__(
        self,
        spec: GatewayImagesSpec,
        metrics: Metrics,
        resolver: AbstractResolver | None = None,
        public: Callable[[str], bool] = is_public,
    ) -> None:
        self._spec, self._results = spec, metrics.image_fetches
        self._domains = AllowedDomains(spec.allowed_media_domains)
        self._places = Admission(spec.max_fetches, metrics.image_fetches_running.set)
        self._resolver, self._public = resolver, public
        self._session: aiohttp.ClientSession | None = None  # from the first fetch on

    async def fetch(self, url: str, client: str, count: Count) -> bytes:
        """Raises ImageNotFetched, and what `count` raises."""
        if not self._domains:
            raise ImageNotFetched(
                "images are not fetched here, since gateway.images.allowed_media_domains is empty; send a data URI"
            )
        try:
            content = await self._fetched(url, client, count)
        except _Failed as failed:
            self._results.labels(failed.result).inc()
            raise ImageNotFetched(str(failed)) from failed
        self._results.labels("fetched").inc()
        return content

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _fetched(self, url: str, client: str, count: Count) -> bytes:
        try:
            async with self._place(client), asyncio.timeout(self._spec.fetch_timeout_s):
                return await self._read(url, count)
        except NotAllowed as error:
            raise _Failed("refused", str(error)) from error
        except TimeoutError as error:
            told = f"the image did not come within {self._spec.fetch_timeout_s:g} s (gateway.images.fetch_timeout_s)"
            raise _Failed("timeout", told) from error

    @asynccontextmanager
    async def _place(self, client: str) -> AsyncGenerator[None, None]:
        await self._places.wait(client)
        try:
            yield
        finally:
            self._places.free(client)

    async def _read(self, address: str, count: Count) -> bytes:
        """Follows redirects itself, since each has to be checked."""
        url = parsed(address)
        for _ in range(self._spec.max_redirects + 1):
            self._domains.check(url)
            try:
                async with self._open().get(url, allow_redirects=False) as response:
                    if response.status not in REDIRECTS:
                        return await self._body(response, count)
                    to = response.headers.get(hdrs.LOCATION, "")
            except (aiohttp.ClientError, OSError) as error:
                raise _told(url, error) from error
            url = url.join(parsed(to))
        raise _Failed("failed", f"more than {self._spec.max_redirects} redirects (gateway.images.max_redirects)")

    async def _body(self, response: aiohttp.ClientResponse, count: Count) -> bytes:
        if response.status != 200:
            raise _Failed("failed", f"{response.url.host} answered with status {response.status}")
        packed = response.headers.get(hdrs.CONTENT_ENCODING, "identity")
        if packed.lower() != "identity":
            raise _Failed("failed", f"{response.url.host} sent the image packed ({packed[:20]!r}), unasked")
        content = bytearray()
        async for chunk in response.content.iter_any():  # its declared length may be wrong
            count(len(chunk))
            content += chunk
            if len(content) > self._spec.max_fetch_bytes:
                most = f"{self._spec.max_fetch_bytes:,} bytes (gateway.images.max_fetch_bytes)"
                raise _Failed("too_large", f"the image has more than {most}")
        return bytes(content)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No connection, cookie or name outlives a fetch; no proxy of the environment's stands between.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    force_close=True,
                    use_dns_cache=False,
                    resolver=self._resolver,
                    socket_factory=self._socket,
                ),
                headers=HEADERS,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            )
        return self._session

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Of every connection, whether its host is a name or an address, asked for or redirected to: what is checked
        here is what is connected to, so a name that changes meanwhile changes nothing."""
        family, kind, protocol, _, (host, *_) = info
        if not self._public(host):
            raise _NotPublic
        return socket.socket(family, kind, protocol)


def _told(url: URL, error: Exception) -> _Failed:
    """In our words: those of the network would tell of what it is inside."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return _Failed("failed", f"{url.host} has no address")
    if isinstance(error.__cause__, _NotPublic):
        return _Failed("refused", f"{url.host} is at no public address")
    if isinstance(error, aiohttp.ClientSSLError):
        return _Failed("failed", f"{url.host} has no certificate that is trusted, or speaks no TLS")
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Failed("failed", f"{url.host} cannot be reached")
    if isinstance(error, aiohttp.InvalidURL):
        return _Failed("refused", f"{url.host} is no host that is connected to")
    return _Failed("failed", f"{url.host} ended the connection, or answered with no HTTP")
