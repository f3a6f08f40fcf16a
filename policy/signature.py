# SPDX-License-Identifier: Apache-2.0
"""A detached PKCS#7 signature of a root hash, as the kernel's dm-verity takes it through `root_hash_sig_key_desc`.

The signed bytes are the root hash as dm-verity's table has it: 64 lower-case hexadecimal digits, no newline (Linux:
drivers/md/dm-verity-verify-sig.c). The form is what its documentation makes with OpenSSL's PKCS7_DETACHED,
PKCS7_NOATTR, PKCS7_BINARY and PKCS7_NOCERTS (Documentation/admin-guide/device-mapper/verity.rst): CMS SignedData (RFC
5652) in DER, one signer, no attributes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import pkcs7

from policy.errors import SignatureError

SIGNATURE_BYTES_MAX: Final = 16 << 10
PEM_BYTES_MAX: Final = 1 << 20
RSA_BITS: Final = (2048, 3072, 4096)  # Linux: crypto/rsa.c takes no others, but shorter ones
CURVES: Final = ("secp256r1", "secp384r1")

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
_Hash: TypeAlias = hashes.SHA256 | hashes.SHA384 | hashes.SHA512

_ROOT_HASH: Final = re.compile(r"[0-9a-f]{64}\Z")
# Object identifiers, as DER has them.
_DATA: Final = bytes.fromhex("2a864886f70d010701")
_SIGNED_DATA: Final = bytes.fromhex("2a864886f70d010702")
_RSA: Final = bytes.fromhex("2a864886f70d010101")
_DIGESTS: Final[dict[bytes, tuple[_Hash, bytes]]] = {  # and ECDSA with each
    bytes.fromhex("608648016503040201"): (hashes.SHA256(), bytes.fromhex("2a8648ce3d040302")),
    bytes.fromhex("608648016503040202"): (hashes.SHA384(), bytes.fromhex("2a8648ce3d040303")),
    bytes.fromhex("608648016503040203"): (hashes.SHA512(), bytes.fromhex("2a8648ce3d040304")),
}
_INTEGER, _OCTETS, _NULL, _OID, _SEQUENCE, _SET, _FIRST, _SECOND = 0x02, 0x04, 0x05, 0x06, 0x30, 0x31, 0xA0, 0xA1


def signed_bytes(root_hash: str) -> bytes:
    """Raises SignatureError."""
    if not _ROOT_HASH.match(root_hash):
        raise SignatureError(f"{root_hash[:80]!r} is no root hash: 64 lower-case hexadecimal digits")
    return root_hash.encode("ascii")


def load_key(path: Path) -> PrivateKey:
    """Of a PEM file. Raises SignatureError, OSError."""
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except TypeError:
        raise SignatureError(f"{path}: the key is encrypted: give one that is not") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: no private key in PEM that can be used: {error}") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise SignatureError(f"{path}: a key of type {_kind(key)}: the kernel's PKCS#7 takes RSA and ECDSA")
    try:
        _usable(key.public_key())
    except SignatureError as error:
        raise SignatureError(f"{path}: {error}") from None
    return key


def load_certificates(path: Path) -> list[x509.Certificate]:
    """All of a PEM file, at least one. Raises SignatureError, OSError."""
    try:
        found = x509.load_pem_x509_certificates(_read(path))
        for certificate in found:
            _usable(certificate.public_key())
            certificate.issuer.public_bytes()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: no certificates in PEM that can be used: {error}") from None
    except SignatureError as error:
        raise SignatureError(f"{path}: {error}") from None
    return found


def load_certificate(path: Path) -> x509.Certificate:
    """The signer's, alone or the first of its chain. Raises SignatureError, OSError."""
    return load_certificates(path)[0]


def sign(root_hash: str, key: PrivateKey, certificate: x509.Certificate, at: datetime | None = None) -> bytes:
    """DER. Raises SignatureError: a key that is not the certificate's, a certificate that is not valid `at` (now)."""
    public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*public) != certificate.public_key().public_bytes(*public):
        raise SignatureError(f"the key is not that of the certificate {_named(certificate)}")
    made = (
        pkcs7.PKCS7SignatureBuilder()
        .set_data(signed_bytes(root_hash))
        .add_signer(certificate, key, hashes.SHA256())
        .sign(
            serialization.Encoding.DER,
            [
                pkcs7.PKCS7Options.DetachedSignature,
                pkcs7.PKCS7Options.Binary,
                pkcs7.PKCS7Options.NoAttributes,
                pkcs7.PKCS7Options.NoCerts,
            ],
        )
    )
    verify(made, root_hash, [certificate], at)
    return made


def verify(
    signature: bytes, root_hash: str, trusted: Sequence[x509.Certificate], at: datetime | None = None
) -> x509.Certificate:
    """The certificate that signed, one of `trusted`: signers themselves, for no chain is followed, and certificates
    in the signature count for nothing. Raises SignatureError for everything that is not understood."""
    message = signed_bytes(root_hash)
    issuer, serial, digest, algorithm, value = _parsed(signature)
    signers = [each for each in trusted if each.serial_number == serial and each.issuer.public_bytes() == issuer]
    if not signers:
        raise SignatureError(f"signed by a certificate that is not trusted, of serial number {serial:X}")
    hash_, with_ecdsa = _DIGESTS[digest]
    now = at or datetime.now(UTC)
    why = ""
    for signer in signers:
        public = signer.public_key()
        try:
            _usable(public)
            if isinstance(public, rsa.RSAPublicKey) and algorithm == _RSA:
                public.verify(value, message, padding.PKCS1v15(), hash_)
            elif isinstance(public, ec.EllipticCurvePublicKey) and algorithm == with_ecdsa:
                public.verify(value, message, ec.ECDSA(hash_))
            else:
                raise SignatureError(f"its signature algorithm is not one of the key of {_named(signer)}")
        except InvalidSignature:
            why = f"not a signature of the root hash {root_hash} by {_named(signer)}"
        except SignatureError as error:
            why = str(error)
        else:
            if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
                raise SignatureError(
                    f"the certificate {_named(signer)} is valid from {signer.not_valid_before_utc:%Y-%m-%d %H:%M:%S}"
                    f" to {signer.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC only"
                )
            return signer
    raise SignatureError(why)


def _parsed(signature: bytes) -> tuple[bytes, int, bytes, bytes, bytes]:
    """(issuer, serial number, digest's and signature's object identifiers, signature). Raises SignatureError."""
    if len(signature) > SIGNATURE_BYTES_MAX:
        raise SignatureError(f"a signature of {len(signature)} bytes is over {SIGNATURE_BYTES_MAX}")
    whole = _Elements(signature)
    content_info = _Elements(whole.take(_SEQUENCE))
    whole.end()
    if content_info.take(_OID) != _SIGNED_DATA:
        raise SignatureError("no PKCS#7 SignedData")
    explicit = _Elements(content_info.take(_FIRST))
    content_info.end()
    signed_data = _Elements(explicit.take(_SEQUENCE))
    explicit.end()
    if signed_data.take(_INTEGER) != b"\x01":
        raise SignatureError("a version of SignedData that is not 1")
    digests = _Elements(signed_data.take(_SET))
    declared = _algorithm(digests.take(_SEQUENCE))
    digests.end()
    content = _Elements(signed_data.take(_SEQUENCE))
    if content.take(_OID) != _DATA:
        raise SignatureError("its content is not of the type data")
    if not content.is_empty():
        raise SignatureError("it holds the content: a signature of a root hash is detached")
    if signed_data.is_next(_FIRST):
        signed_data.take(_FIRST)  # certificates: who is trusted is not for a signature to say
    signers = _Elements(signed_data.take(_SET))
    signed_data.end()
    signer = _Elements(signers.take(_SEQUENCE))
    if not signers.is_empty():
        raise SignatureError("it has several signers: one is expected")
    if signer.take(_INTEGER) != b"\x01":
        raise SignatureError("its signer is not named by issuer and serial number")
    name = _Elements(signer.take(_SEQUENCE))
    issuer, serial = name.take_whole(_SEQUENCE), int.from_bytes(name.take(_INTEGER), signed=True)
    name.end()
    digest = _algorithm(signer.take(_SEQUENCE))
    if signer.is_next(_FIRST):
        raise SignatureError("it has signed attributes: none are expected")
    algorithm = _algorithm(signer.take(_SEQUENCE))
    value = signer.take(_OCTETS)
    if signer.is_next(_SECOND):
        raise SignatureError("it has unsigned attributes: none are expected")
    signer.end()
    if digest not in _DIGESTS or declared != digest:
        raise SignatureError("its digest algorithm is not one of SHA-256, SHA-384, SHA-512")
    return issuer, serial, digest, algorithm, value


def _algorithm(content: bytes) -> bytes:
    inside = _Elements(content)
    found = inside.take(_OID)
    if not inside.is_empty() and inside.take(_NULL):
        raise SignatureError("an algorithm has parameters")
    inside.end()
    return found


class _Elements:
    """The elements of DER (ITU-T X.690) in their order; only tags of one byte, lengths in the shortest form."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def is_empty(self) -> bool:
        return self._at == len(self._raw)

    def is_next(self, tag: int) -> bool:
        return not self.is_empty() and self._raw[self._at] == tag

    def end(self) -> None:
        if not self.is_empty():
            raise SignatureError("no PKCS#7 signature in DER: something follows that is not expected")

    def take(self, tag: int) -> bytes:
        start, end = self._bounds(tag)
        self._at = end
        return self._raw[start:end]

    def take_whole(self, tag: int) -> bytes:
        first, (_, end) = self._at, self._bounds(tag)
        self._at = end
        return self._raw[first:end]

    def _bounds(self, tag: int) -> tuple[int, int]:
        raw, at = self._raw, self._at
        if len(raw) - at < 2 or raw[at] != tag:
            raise SignatureError(f"no PKCS#7 signature in DER: an element of tag {tag:#04x} is missing")
        start, size = at + 2, raw[at + 1]
        if size >= 0x80:
            digits = size & 0x7F
            size = int.from_bytes(raw[start : start + digits]) if 1 <= digits <= 4 else 0
            start += digits
            if size < 0x80 or size < 1 << 8 * (digits - 1):
                raise SignatureError("no PKCS#7 signature in DER: a length is not in its shortest form")
        if size > len(raw) - start:
            raise SignatureError("no PKCS#7 signature in DER: it is cut off")
        return start, start + size


def _usable(key: object) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in RSA_BITS:
            raise SignatureError(f"an RSA key of {key.key_size} bits: the kernel takes {', '.join(map(str, RSA_BITS))}")
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in CURVES:
            raise SignatureError(f"an ECDSA key on {key.curve.name}: kernels take {', '.join(CURVES)}")
    else:
        raise SignatureError(f"a key of type {_kind(key)}: the kernel's PKCS#7 takes RSA and ECDSA")


def _kind(key: object) -> str:
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")


def _named(certificate: x509.Certificate) -> str:
    return f"{certificate.subject.rfc4514_string()[:200]!r} (serial number {certificate.serial_number:X})"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(PEM_BYTES_MAX + 1)
    if len(raw) > PEM_BYTES_MAX:
        raise SignatureError(f"{path}: over {PEM_BYTES_MAX} bytes: no key or certificate")
    return raw
