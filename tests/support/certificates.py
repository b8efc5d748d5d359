"""A CA of one's own and a server that speaks TLS with it; the Valkey of the wheel does not."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from tests.support.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM.

    Attributes:
        authority: Who signed.
        certificate: Of a server at 127.0.0.1.
        key: Its key.
    """

    authority: Path
    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """Of a server, beside its ``--tls-port``."""
        files = ("--tls-ca-cert-file", self.authority, "--tls-cert-file", self.certificate)
        return (*map(str, files), "--tls-key-file", str(self.key), "--tls-auth-clients", "no")


@contextlib.contextmanager
def made_certificates(host: str = "IP:127.0.0.1") -> Iterator[Certificates]:
    """A CA, and a certificate for one host, such as ``IP:127.0.0.1`` or ``DNS:elsewhere``."""
    folder = Path(tempfile.mkdtemp(prefix="gw-test-"))
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    try:
        _openssl(
            "req", "-x509", *kind, "-subj", "/CN=test authority", "-keyout", str(folder / "ca.key"),
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", str(made.authority),
        )  # fmt: skip
        _openssl(
            "req", "-x509", *kind, "-subj", "/CN=test server", "-keyout", str(made.key),
            "-addext", f"subjectAltName={host}", "-addext", "basicConstraints=critical,CA:FALSE",
            "-CA", str(made.authority), "-CAkey", str(folder / "ca.key"), "-out", str(made.certificate),
        )  # fmt: skip
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tls_server_binary() -> str:
    """A server that can; the test is skipped where there is none."""
    binary = shutil.which("redis-server")
    if binary is None or shutil.which("openssl") is None:
        pytest.skip("needs a redis-server with TLS, and openssl (Debian, Ubuntu: redis-server openssl)")
    return binary


class TlsServer(Server):
    """A server whose only port speaks TLS; clients need no certificate."""

    def __init__(self, certificates: Certificates, *options: str, config: str = "") -> None:
        super().__init__(*options, binary=tls_server_binary(), config=config)
        self._certificates = certificates
        self._options = ("--port", "0", "--tls-port", str(self.port), *certificates.options, *options)

    @property
    def admin(self) -> redis.Redis:
        """As of any server."""
        authority = str(self._certificates.authority)
        return redis.Redis("127.0.0.1", self.port, ssl=True, ssl_ca_certs=authority, socket_timeout=5)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
