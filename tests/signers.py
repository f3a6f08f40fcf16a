# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates for tests, made anew."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID


def certificate_of(key: Any, name: str = "a signer", *, days: tuple[int, int] = (-1, 30)) -> x509.Certificate:
    """Signed by itself; valid from and until so many days from now."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .sign(key, hashes.SHA256())
    )


class Signer:
    def __init__(
        self, directory: Path, name: str = "signer", key: Any = None, days: tuple[int, int] = (-1, 30)
    ) -> None:
        self.key = key or rsa.generate_private_key(65537, 2048)
        self.certificate = certificate_of(self.key, name, days=days)
        self.key_path, self.certificate_path = directory / f"{name}.key", directory / f"{name}.crt"
        self.key_path.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.certificate_path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
