"""TLS of our ports, from files that are read again when they change.

GatewayTls   what the gateway shows to clients
PeerTls      what gateway and workers show to each other: each has a certificate of the same authority, with the
             same name, whatever its address is
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tercet.errors import PeerMismatch, SpecError
from tercet.spec import PeerTlsSpec, TlsSpec
from tercet.watched import Watched


class Files(NamedTuple):
    """PEM, as gRPC takes it."""

    root: bytes
    key: bytes
    chain: bytes


class GatewayTls:
    def __init__(self, spec: TlsSpec, protocols: Sequence[str]) -> None:
        """protocols: that are spoken within, by their ALPN names. Raises SpecError."""
        self._spec, self._protocols = spec, list(protocols)
        self._context = Watched([spec.certificate, spec.key], self._made)

    def server(self) -> ssl.SSLContext:
        return self._context.value

    def check(self, certificate: Any) -> None:
        """Clients show none; their keys say who they are."""

    def _made(self) -> ssl.SSLContext:
        return _server(self._spec, self._protocols, "gateway.tls")


class PeerTls:
    """Any thread."""

    def __init__(self, spec: PeerTlsSpec) -> None:
        """Raises SpecError."""
        self._spec, self.name = spec, spec.name
        self._all = Watched([spec.certificate, spec.key, spec.ca], self._made)

    def server(self) -> ssl.SSLContext:
        """Takes nobody without a certificate; `check` its name behind the handshake."""
        return self._all.value[0]

    def client(self) -> ssl.SSLContext:
        """Checks the other end's certificate, and its name if it is given as the server's."""
        return self._all.value[1]

    def files(self) -> Files:
        return self._all.value[2]

    def check(self, certificate: Any) -> None:
        """certificate: `SSLObject.getpeercert`'s. Raises PeerMismatch."""
        names = [name for kind, name in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"]
        if self.name not in names:
            raise PeerMismatch(f"the peer's certificate is for {', '.join(names) or 'nobody'}, not for {self.name}")

    def _made(self) -> tuple[ssl.SSLContext, ssl.SSLContext, Files]:
        spec, path = self._spec, "network.tls"
        files = Files(*(_bytes_of(each, path) for each in (spec.ca, spec.key, spec.certificate)))
        server = _server(spec, ["h2"], path)
        server.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(server, spec.ca, f"{path}.ca")
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_own(client, spec.certificate, spec.key, path)
        _load_authorities(client, spec.ca, f"{path}.ca")
        return server, client, files


def _server(spec: TlsSpec | PeerTlsSpec, protocols: Sequence[str], path: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(protocols)
    _load_own(context, spec.certificate, spec.key, path)
    return context


def _bytes_of(file: str, path: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: {file} cannot be read: {error.strerror}") from error


def _load_own(context: ssl.SSLContext, certificate: str, key: str, path: str) -> None:
    try:
        context.load_cert_chain(certificate, key, password=_none)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: {certificate} and {key} are no certificate and its key: {error}") from error


def _load_authorities(context: ssl.SSLContext, path: str, key: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"{key}: {path} has no certificates of authorities: {error}") from error


def _none() -> str:
    """OpenSSL would ask the terminal for the key's passphrase."""
    raise ValueError("the key has a passphrase, which nobody is here to type")
