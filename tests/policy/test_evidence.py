# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from policy.errors import EvidenceError
from policy.evidence import Report, check_bound, check_snp_signature, parsed
from policy.initdata import HOSTDATA_BYTES, MRCONFIGID_BYTES, fitted, policy_digest

POLICY = policy_digest("package agent_policy\n")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def snp(version: int = 3, policy: int = 0x30000, bound: bytes = POLICY) -> bytearray:
    """By the table of the specification."""
    report = bytearray(1184)
    report[0:4] = version.to_bytes(4, "little")
    report[8:16] = policy.to_bytes(8, "little")
    report[0x34:0x38] = (1).to_bytes(4, "little")
    report[0x90:0xC0] = bytes(range(48))
    report[0xC0:0xE0] = bound
    return report


def tdx(version: int = 4, attributes: int = 0, kind: int = 2, size: int = 584) -> bytes:
    body = bytearray(size)
    body[120] = attributes
    body[136:184] = bytes(range(48))
    body[184:232] = fitted(POLICY, 48)
    head = version.to_bytes(2, "little") + (2).to_bytes(2, "little") + (0x81).to_bytes(4, "little") + bytes(40)
    described = kind.to_bytes(2, "little") + size.to_bytes(4, "little") if version == 5 else b""
    return head + described + bytes(body) + bytes(100)  # and a signature


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_an_snp_report(version: int) -> None:
    report = parsed(bytes(snp(version)))
    assert (report.kind, report.version, report.measurement, report.bound) == ("SNP", version, bytes(range(48)), POLICY)
    check_bound(report, fitted(POLICY, HOSTDATA_BYTES))


@pytest.mark.parametrize(("version", "kind", "size"), [(4, 2, 584), (5, 2, 584), (5, 3, 648)])
def test_a_tdx_quote(version: int, kind: int, size: int) -> None:
    report = parsed(tdx(version, kind=kind, size=size))
    assert (report.kind, report.version, report.measurement) == ("TDX", version, bytes(range(48)))
    check_bound(report, fitted(POLICY, MRCONFIGID_BYTES))


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "a short one": (bytes(snp())[:-1], "1183 bytes"),
    "a long one": (bytes(snp()) + b"\0", "1185 bytes"),
    "an old version": (bytes(snp(1)), "version 1"),
    "a new version": (bytes(snp(6)), "version 6"),
    "another guest's policy": (bytes(snp(policy=0x30000 | 1 << 19)), "debug"),
    "a TD that may be debugged": (tdx(attributes=1), "debug"),
    "a quote of SGX": (tdx().replace(b"\x81\0\0\0", b"\0\0\0\0", 1), "no TDX quote"),
    "a quote that ends": (tdx()[: 48 + 500], "ends after 500 of 584"),
    "a quote that ends in its header": (tdx(5)[:50], "ends in its header"),
    "a body of SGX": (tdx(5, kind=1), "no TD report"),
    "a body of another size": (tdx(5, kind=3, size=584), "no TD report"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_proves_nothing_is_refused(what: str) -> None:
    raw, words = BAD[what]
    with pytest.raises(EvidenceError, match=words):
        parsed(raw)


def test_another_policy_is_refused_by_both_digests() -> None:
    other = policy_digest("package other\n")
    with pytest.raises(EvidenceError, match=f"HOSTDATA is {POLICY.hex()}, the policy's digest is {other.hex()}"):
        check_bound(parsed(bytes(snp())), other)
    with pytest.raises(EvidenceError, match="MRCONFIGID"):
        check_bound(parsed(tdx()), fitted(other, 48))


@given(st.binary(max_size=2000))
def test_whatever_comes_is_a_report_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parsed(raw), Report)
    except EvidenceError:
        pass


# The chain: AMD's root signs by RSA-PSS, a chip's key is on P-384.


@cache
def keys() -> tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]:
    return (
        rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
    )  # fmt: skip


def certificate(subject: str, key: object, issuer: str, by: object, days: int = 365) -> bytes:
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())  # type: ignore[attr-defined]
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=days))
        .sign(by, hashes.SHA384())  # type: ignore[arg-type]
    )
    return made.public_bytes(Encoding.PEM)


@cache
def chain() -> tuple[bytes, bytes, bytes]:
    root, middle, chip = keys()
    return (
        certificate("VCEK", chip, "ASK", middle), certificate("ASK", middle, "ARK", root),
        certificate("ARK", root, "ARK", root),
    )  # fmt: skip


def signed(report: bytearray, key: ec.EllipticCurvePrivateKey | None = None) -> Report:
    first, second = decode_dss_signature((key or keys()[2]).sign(bytes(report[:0x2A0]), ec.ECDSA(hashes.SHA384())))
    report[0x2A0 : 0x2A0 + 72] = first.to_bytes(72, "little")
    report[0x2A0 + 72 : 0x2A0 + 144] = second.to_bytes(72, "little")
    return parsed(bytes(report))


def test_a_signature_and_its_chain() -> None:
    check_snp_signature(signed(snp()), chain(), NOW)
    ders = [x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER) for pem in chain()]
    check_snp_signature(signed(snp()), ders, NOW)


def changed(at: int) -> Report:
    raw = bytearray(signed(snp()).raw)
    raw[at] ^= 1
    return parsed(bytes(raw))


REFUSED: dict[str, tuple[Callable[[], tuple[Report, tuple[bytes, ...]]], str]] = {
    "a changed report": (lambda: (changed(0xC0), chain()), "not signed by the key"),
    "a changed signature": (lambda: (changed(0x2A0), chain()), "not signed by the key"),
    "no signature": (lambda: (parsed(bytes(snp())), chain()), "not signed by the key"),
    "another key": (lambda: (signed(snp(), ec.generate_private_key(ec.SECP384R1())), chain()), "not signed by the key"),
    "no chain": (lambda: (signed(snp()), chain()[:1]), "has to lead"),
    "a chain without its root": (lambda: (signed(snp()), chain()[:2]), "certificate 2 is not signed"),
    "a chain without its middle": (lambda: (signed(snp()), (chain()[0], chain()[2])), "certificate 1 is not signed"),
    "a chain in another order": (lambda: (signed(snp()), chain()[::-1]), "is not signed by the next one"),
    "no certificate": (lambda: (signed(snp()), (b"x", *chain()[1:])), "no certificate"),
    "a key of another kind": (
        lambda: (signed(snp()), (certificate("VCEK", keys()[1], "ASK", keys()[1]), *chain()[1:])), "no key on P-384"),
    "a certificate of another time": (
        lambda: (signed(snp()), (certificate("VCEK", keys()[2], "ASK", keys()[1], days=0), *chain()[1:])), "not valid"),
    "another algorithm": (
        lambda: (signed(bytearray(snp()[:0x34]) + bytearray(4) + snp()[0x38:]), chain()), "not ECDSA on P-384"),
    "a quote": (lambda: (parsed(tdx()), chain()), "of a TDX quote"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_signed_is_refused(what: str) -> None:
    make, words = REFUSED[what]
    report, certificates = make()
    at = NOW + timedelta(hours=1) if "time" in what else NOW
    with pytest.raises(EvidenceError, match=words):
        check_snp_signature(report, certificates, at)
