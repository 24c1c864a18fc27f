"""Certificates for tests: an authority, and what it vouches for, as files."""

from __future__ import annotations

from pathlib import Path

import trustme

from tercet.spec import PeerTlsSpec, TlsSpec


class Authority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ca = folder, trustme.CA()
        self.path = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def vouch(self, name: str, *identities: str) -> tuple[str, str]:
        """-> the files of a certificate and its key, made or replaced."""
        issued = self._ca.issue_cert(*identities)
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        for path, blob in (
            (certificate, b"".join(blob.bytes() for blob in issued.cert_chain_pems)),
            (key, issued.private_key_pem.bytes()),
        ):
            part = path.with_suffix(".part")
            part.write_bytes(blob)
            part.replace(path)
        return str(certificate), str(key)

    def gateway(self, *identities: str) -> TlsSpec:
        certificate, key = self.vouch("gateway", *(identities or ("127.0.0.1", "localhost")))
        return TlsSpec(certificate=certificate, key=key)

    def peer(self, name: str = "tercet", file: str = "peer") -> PeerTlsSpec:
        certificate, key = self.vouch(file, name)
        return PeerTlsSpec(certificate=certificate, key=key, ca=str(self.path))
