"""What may be fetched for a client: which addresses it may name, and which of the network's are connected to. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from yarl import URL

URL_CHARS, AUTHORITY_CHARS = 8192, 512  # a name of other letters takes time by the square of its length
WEB_PORTS = (80, 443)
AUTHORITY = re.compile(r"[^/?#]*//([^/?#]*)")
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")  # as yarl writes it

GLOBAL_UNICAST, NAT64 = ip_network("2000::/3"), ip_network("64:ff9b::/96")
NOT_PUBLIC = (  # beside what `ipaddress` knows of, which differs between versions of Python
    *map(ip_network, ("192.0.0.0/24", "192.88.99.0/24")),  # protocol assignments, relays of 6to4
    ip_network("168.63.129.16/32"),  # a cloud's host, as its machines see it
    *map(ip_network, ("2001::/23", "2002::/16")),  # tunnels (Teredo, 6to4), which hold another address
    *map(ip_network, ("2001:db8::/32", "3fff::/20")),  # documentation
)


class NotAllowed(Exception):
    """Why an address is not fetched, in words for the client."""


def is_public(address: str) -> bool:
    """Whether anybody on the internet is meant by an IP address: no machine of ours, no network of ours, no cloud's
    metadata, and no IPv6 address that stands for such an IPv4 address."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if ip in NAT64:
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in NOT_PUBLIC):
        return False
    if isinstance(ip, IPv6Address):
        return ip in GLOBAL_UNICAST
    return ip.is_global and not ip.is_multicast


def parsed(address: str) -> URL:
    """By the parser of what connects to it. Raises NotAllowed."""
    if len(address) > URL_CHARS:
        raise NotAllowed(f"the address has more than {URL_CHARS} characters")
    authority = AUTHORITY.match(address)
    if any(blank in address for blank in "\t\r\n") or (authority and len(authority[1]) > AUTHORITY_CHARS):
        raise NotAllowed("the address is no URL")
    try:
        return URL(address)
    except ValueError as error:
        raise NotAllowed("the address is no URL") from error


class AllowedDomains:
    """Entries as in the spec: NAME, NAME:PORT, *.NAME, *.NAME:PORT; without a port both of the web's."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = [entry.partition(":")[::2] for entry in entries]  # name, port or ""

    def __bool__(self) -> bool:
        return bool(self._entries)

    def check(self, url: URL) -> None:
        """Raises NotAllowed."""
        if url.scheme not in ("http", "https"):
            raise NotAllowed(f"only http and https addresses are fetched, not {url.scheme[:20]!r}")
        if url.user is not None or url.password is not None:
            raise NotAllowed("the address must not have a user or a password")
        host = url.raw_host or ""
        if not HOST.fullmatch(host) or not any(self._fits(entry, host, url.port) for entry in self._entries):
            named = f"{host[:253]!r}" if url.port in WEB_PORTS else f"{host[:253]!r} with port {url.port}"
            raise NotAllowed(f"{named} is not among gateway.images.allowed_media_domains")

    @staticmethod
    def _fits(entry: tuple[str, str], host: str, port: int | None) -> bool:
        name, listed = entry
        host = host.removesuffix(".")
        if port not in ((int(listed),) if listed else WEB_PORTS):
            return False
        return host.endswith(name[1:]) if name.startswith("*.") else host == name
