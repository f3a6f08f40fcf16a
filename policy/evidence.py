# SPDX-License-Identifier: Apache-2.0
"""What a TEE's report says of the policy that its guest was started with.

SEV-SNP: AMD publication 56860, "SEV Secure Nested Paging Firmware ABI Specification", ATTESTATION_REPORT Structure.
TDX: Intel, "Intel TDX DCAP Quoting Library API", appendix on quote formats 4 and 5; TD report body of "Intel TDX Module
Architecture Specification". Read as far as that field and what makes it worthless: a guest that may be debugged.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from policy.errors import EvidenceError
from policy.initdata import HOSTDATA_BYTES, MRCONFIGID_BYTES

SNP_REPORT_BYTES: Final = 1184
_SNP_VERSIONS: Final = range(2, 6)
_SNP_SIGNED_BYTES: Final = 0x2A0
_SNP_POLICY: Final = struct.Struct("<Q")
_SNP_POLICY_AT: Final = 0x08
_SNP_DEBUG: Final = 1 << 19
_SNP_ALGORITHM_AT: Final = 0x34
_SNP_ECDSA_P384_SHA384: Final = 1
_SNP_MEASUREMENT_AT: Final = 0x90
_SNP_HOSTDATA_AT: Final = 0xC0
_SNP_NUMBER_BYTES: Final = 72  # of a signature's R and of its S, the lowest byte first

_TDX_HEADER: Final = struct.Struct("<HHI")  # version, kind of the key, kind of the TEE
_TDX_HEADER_BYTES: Final = 48
_TDX_TEE: Final = 0x81
_TDX_BODY: Final = struct.Struct("<HI")  # of version 5: kind and size of the body
_TDX_BODIES: Final = {2: 584, 3: 648}  # TD report of module 1.0 and of 1.5, which begins with the same fields
_TDX_ATTRIBUTES_AT: Final = 120
_TDX_DEBUG: Final = 1
_TDX_MRTD_AT: Final = 136
_TDX_MRCONFIGID_AT: Final = 184


@dataclass(frozen=True, slots=True)
class Report:
    """`kind`: "SNP" or "TDX". `bound`: HOSTDATA or MRCONFIGID. `measurement`: of what was loaded at the start, firmware
    and what that measures. `raw`: the whole report."""

    kind: str
    version: int
    measurement: bytes
    bound: bytes
    raw: bytes


def parsed(raw: bytes) -> Report:
    """An SNP report or a TDX quote. Raises EvidenceError, also for a guest that may be debugged."""
    version = int.from_bytes(raw[:2], "little")
    if len(raw) == SNP_REPORT_BYTES and int.from_bytes(raw[:4], "little") in _SNP_VERSIONS:
        return _snp(raw)
    if len(raw) >= _TDX_HEADER_BYTES and version in (4, 5) and _TDX_HEADER.unpack_from(raw)[2] == _TDX_TEE:
        return _tdx(raw, version)
    raise EvidenceError(
        f"{len(raw)} bytes of version {version} are no SNP report (version 2 to 5, {SNP_REPORT_BYTES} bytes) and no TDX"
        " quote (version 4 or 5)"
    )


def _snp(raw: bytes) -> Report:
    (policy,) = _SNP_POLICY.unpack_from(raw, _SNP_POLICY_AT)
    if policy & _SNP_DEBUG:
        raise EvidenceError("the guest's policy lets its host debug it: the report proves nothing")
    return Report(
        "SNP",
        int.from_bytes(raw[:4], "little"),
        raw[_SNP_MEASUREMENT_AT : _SNP_MEASUREMENT_AT + 48],
        raw[_SNP_HOSTDATA_AT : _SNP_HOSTDATA_AT + HOSTDATA_BYTES],
        raw,
    )


def _tdx(raw: bytes, version: int) -> Report:
    at, size = _TDX_HEADER_BYTES, _TDX_BODIES[2]
    if version == 5:
        if len(raw) < at + _TDX_BODY.size:
            raise EvidenceError("the quote ends in its header")
        kind, said = _TDX_BODY.unpack_from(raw, at)
        if _TDX_BODIES.get(kind) != said:
            raise EvidenceError(f"the quote has a body of kind {kind} and {said} bytes, which is no TD report")
        at, size = at + _TDX_BODY.size, said
    body = raw[at : at + size]
    if len(body) < size:
        raise EvidenceError(f"the quote ends after {len(body)} of {size} bytes of its TD report")
    if body[_TDX_ATTRIBUTES_AT] & _TDX_DEBUG:
        raise EvidenceError("the TD's attributes let its host debug it: the quote proves nothing")
    return Report(
        "TDX",
        version,
        body[_TDX_MRTD_AT : _TDX_MRTD_AT + 48],
        body[_TDX_MRCONFIGID_AT : _TDX_MRCONFIGID_AT + MRCONFIGID_BYTES],
        raw,
    )


def check_bound(report: Report, wanted: bytes) -> None:
    """`wanted`: the policy's digest, cut or filled up as `initdata.fitted` does. Raises EvidenceError."""
    if report.bound != wanted:
        name = "HOSTDATA" if report.kind == "SNP" else "MRCONFIGID"
        raise EvidenceError(f"{name} is {report.bound.hex()}, the policy's digest is {wanted.hex()}")


def check_snp_signature(report: Report, chain: Sequence[bytes], now: datetime | None = None) -> None:
    """`chain`: certificates in PEM or DER, the report's key (VCEK or VLEK) first, then who signed it, up to one that
    signed itself: the caller knows that this is AMD's (ARK). Raises EvidenceError."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    if report.kind != "SNP":
        raise EvidenceError("the signature of a TDX quote is not checked here")
    if int.from_bytes(report.raw[_SNP_ALGORITHM_AT : _SNP_ALGORITHM_AT + 4], "little") != _SNP_ECDSA_P384_SHA384:
        raise EvidenceError("the report is signed by an algorithm that is not ECDSA on P-384 with SHA-384")
    try:
        certificates = [
            x509.load_pem_x509_certificate(raw) if b"-----BEGIN" in raw else x509.load_der_x509_certificate(raw)
            for raw in chain
        ]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EvidenceError(f"no certificate: {error}") from None
    if len(certificates) < 2:
        raise EvidenceError("the chain has to lead from the report's key to one that signed itself")
    at = now or datetime.now(UTC)
    for number, certificate in enumerate(certificates):
        issuer = certificates[min(number + 1, len(certificates) - 1)]
        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise EvidenceError(f"certificate {number + 1} of the chain is not valid now")
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise EvidenceError(f"certificate {number + 1} is not signed by the next one: {error!r}") from None
    key = certificates[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EvidenceError("the first certificate has no key on P-384")
    first, second = (
        int.from_bytes(report.raw[start : start + _SNP_NUMBER_BYTES], "little")
        for start in (_SNP_SIGNED_BYTES, _SNP_SIGNED_BYTES + _SNP_NUMBER_BYTES)
    )
    try:
        key.verify(encode_dss_signature(first, second), report.raw[:_SNP_SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise EvidenceError("the report is not signed by the key of the first certificate") from None
