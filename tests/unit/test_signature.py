# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from hypothesis import given
from hypothesis import strategies as st

from policy import signature, signature_store
from policy.errors import SignatureError
from policy.hashed import HashedImage, HashedLayer
from policy.signature_store import SignedImage, SignedLayer
from tests.signers import Signer, certificate_of

ROOT_HASH, OTHER = "ab" * 32, "cd" * 32
KEY = rsa.generate_private_key(65537, 2048)
CERTIFICATE = certificate_of(KEY)
SIGNED = signature.sign(ROOT_HASH, KEY, CERTIFICATE)
Options = pkcs7.PKCS7Options
DETACHED = [Options.DetachedSignature, Options.Binary, Options.NoAttributes, Options.NoCerts]


def made(*options: Options, digest: Any = None, key: Any = KEY, signers: int = 1, data: str = ROOT_HASH) -> bytes:
    builder = pkcs7.PKCS7SignatureBuilder().set_data(data.encode())
    for _ in range(signers):
        builder = builder.add_signer(CERTIFICATE if key is KEY else certificate_of(key), key, digest or hashes.SHA256())
    return builder.sign(serialization.Encoding.DER, options or DETACHED)


def refused(raw: bytes, trusted: Any = CERTIFICATE, at: datetime | None = None, root_hash: str = ROOT_HASH) -> str:
    with pytest.raises(SignatureError) as caught:
        signature.verify(raw, root_hash, [trusted], at)
    return str(caught.value)


def openssl(program: str, *arguments: str | Path) -> bool:
    return subprocess.run(["openssl", program, "-binary", *arguments], capture_output=True).returncode == 0


@pytest.mark.tool
@pytest.mark.parametrize("key", [KEY, ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())])
def test_openssl_accepts_what_is_signed(key: Any, tmp_path: Path) -> None:
    signer = Signer(tmp_path, key=key)
    signed, content = tmp_path / "signed", tmp_path / "content"
    signed.write_bytes(signature.sign(ROOT_HASH, signature.load_key(signer.key_path), signer.certificate))
    with_file = ("-verify", "-inform", "DER", "-in", signed, "-content", content, "-noverify", "-out", "/dev/null")
    for text, accepted in ((ROOT_HASH, True), (ROOT_HASH + "\n", False), (OTHER, False)):
        content.write_text(text)
        for program in ("cms", "smime"):
            assert openssl(program, *with_file, "-certfile", signer.certificate_path) == accepted


@pytest.mark.tool
def test_what_openssl_signs_is_accepted(tmp_path: Path) -> None:
    signer = Signer(tmp_path)
    signed, content = tmp_path / "signed", tmp_path / "content"
    content.write_text(ROOT_HASH)
    with_key = ("-signer", signer.certificate_path, "-inkey", signer.key_path, "-out", signed)
    for program in ("cms", "smime"):
        for more in ([], ["-nocerts"]):
            assert openssl(program, "-sign", "-noattr", "-outform", "DER", "-in", content, *with_key, *more)
            raw = signed.read_bytes()
            assert signature.verify(raw, ROOT_HASH, [CERTIFICATE, signer.certificate]) == signer.certificate


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "missing"),
    "cut off": (SIGNED[:-1], "cut off"),
    "half": (SIGNED[: len(SIGNED) // 2], "cut off"),
    "something behind": (SIGNED + b"\0", "follows"),
    "huge": (SIGNED + bytes(1 << 20), "over 16384"),
    "huge length": (b"\x30\x84\xff\xff\xff\xff" + SIGNED, "cut off"),
    "indefinite length": (b"\x30\x80" + SIGNED, "shortest form"),
    "nested": (b"\x30\x82\x10\x00" * 4000, ""),
    "other content": (made(data=OTHER), "not a signature of the root hash"),
    "a newline behind the root hash": (made(data=ROOT_HASH + "\n"), "not a signature"),
    "its bytes instead of its digits": (
        pkcs7.PKCS7SignatureBuilder()
        .set_data(bytes.fromhex(ROOT_HASH))
        .add_signer(CERTIFICATE, KEY, hashes.SHA256())
        .sign(serialization.Encoding.DER, DETACHED),
        "not a signature",
    ),
    "content inside": (made(Options.Binary, Options.NoAttributes), "holds the content"),
    "attributes": (made(Options.DetachedSignature, Options.Binary), "signed attributes"),
    "SHA-224": (SIGNED.replace(b"\x04\x02\x01", b"\x04\x02\x04"), "SHA-256"),
    "several signers": (made(signers=2), ""),
    "another signer": (made(key=rsa.generate_private_key(65537, 2048)), "not trusted"),
    "PEM": (b"-----BEGIN PKCS7-----\n", "missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_signature_is_refused(case: str) -> None:
    raw, why = BAD[case]
    assert why in refused(raw)


def test_a_certificate_counts_only_while_it_is_valid() -> None:
    now = datetime.now(UTC)
    assert "valid from" in refused(SIGNED, at=now + timedelta(days=31))
    assert "valid from" in refused(SIGNED, at=now - timedelta(days=2))
    expired = certificate_of(KEY, days=(-9, -1))
    with pytest.raises(SignatureError, match="valid from"):
        signature.sign(ROOT_HASH, KEY, expired)


def test_no_certificate_no_trust() -> None:
    with pytest.raises(SignatureError, match="not trusted"):
        signature.verify(SIGNED, ROOT_HASH, [])
    # The same name and serial number, another key.
    assert "not trusted" in refused(SIGNED, certificate_of(rsa.generate_private_key(65537, 2048)))


def test_only_the_key_of_the_certificate_signs() -> None:
    with pytest.raises(SignatureError, match="not that of the certificate"):
        signature.sign(ROOT_HASH, rsa.generate_private_key(65537, 2048), CERTIFICATE)


@pytest.mark.parametrize("text", ["", ROOT_HASH.upper(), ROOT_HASH + "\n", ROOT_HASH[:-1], "sha256:" + ROOT_HASH])
def test_what_is_no_root_hash_is_neither_signed_nor_verified(text: str) -> None:
    with pytest.raises(SignatureError, match="no root hash"):
        signature.sign(text, KEY, CERTIFICATE)
    assert "no root hash" in refused(SIGNED, root_hash=text)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (rsa.generate_private_key(65537, 1024), "1024 bits"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    ],
)
def test_keys_that_the_kernel_does_not_take(key: Any, why: str, tmp_path: Path) -> None:
    raw = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key").write_bytes(raw)
    with pytest.raises(SignatureError, match=why):
        signature.load_key(tmp_path / "key")


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    encrypted = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    for raw, why in ((b"", "no private key"), (encrypted, "is encrypted"), (b"\0" * (2 << 20), "over 1048576")):
        (tmp_path / "key").write_bytes(raw)
        with pytest.raises(SignatureError, match=why):
            signature.load_key(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"not one")
    with pytest.raises(SignatureError, match="no certificates"):
        signature.load_certificates(tmp_path / "key")


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_no_changed_byte_is_accepted(at: int, change: int) -> None:
    mutant = bytearray(SIGNED)
    mutant[at] ^= change
    refused(bytes(mutant))


@given(st.binary(max_size=300))
def test_no_bytes_are_a_signature_or_a_crash(raw: bytes) -> None:
    refused(raw)
    with pytest.raises(SignatureError):
        signature_store.parse(b"\x01" + raw)


DIGEST = "sha256:" + "12" * 32
IMAGE = SignedImage("registry.example/app:1", (SignedLayer(DIGEST, ROOT_HASH, SIGNED),))


def test_the_file_is_in_microsofts_form_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "signatures.json"
    signature_store.add(path, IMAGE)
    assert json.loads(path.read_text()) == [
        {
            "name": "registry.example/app:1",
            "layers": [{"digest": DIGEST, "root_hash": ROOT_HASH, "signature": base64.b64encode(SIGNED).decode()}],
        }
    ]
    other = SignedImage("other", IMAGE.layers)
    signature_store.add(path, other)
    signature_store.add(path, IMAGE)
    assert signature_store.read(path) == [other, IMAGE]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def layer_of(**change: Any) -> bytes:
    plain = {"digest": DIGEST, "root_hash": ROOT_HASH, "signature": base64.b64encode(SIGNED).decode()} | change
    return json.dumps([{"name": "n", "layers": [plain]}]).encode()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "truncated"),
        (b"[", "truncated"),
        (b"{}", "array"),
        (b"[" * 100_000, ""),
        (b"\xff\xfe", ""),
        (b'[{"name": 1, "layers": []}]', "name"),
        (b'[{"name": "n"}]', "layers"),
        (b'[{"name": "n", "layers": [], "more": 1}]', "more"),
        (layer_of(digest="sha256:1"), "no digest"),
        (layer_of(root_hash="AB" * 32), "no root hash"),
        (layer_of(signature="%%"), "not base64"),
        (layer_of(signature=""), "0 bytes"),
        (layer_of(signature="A" * 100_000), "over 16384"),
        (b" " * (9 << 20), "over 8388608"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it_and_stays(raw: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "signatures.json"
    path.write_bytes(raw)
    with pytest.raises(SignatureError, match=f"signatures.json: .*{why}"):
        signature_store.read(path)
    with pytest.raises(SignatureError, match=r"signatures\.json"):
        signature_store.add(path, IMAGE)
    assert path.read_bytes() == raw


def test_of_an_image_all_layers_are_signed_and_the_one_on_top() -> None:
    layer = HashedLayer("sha256:" + "1" * 64, "tar-index", ROOT_HASH, 4096, DIGEST)
    on_top = HashedLayer("sha256:" + "2" * 64, "tar-index-parents", OTHER, 4096)
    image = HashedImage("app", "sha256:" + "3" * 64, "", "linux/amd64", (layer,), on_top)
    assert signature_store.to_sign(image) == [(DIGEST, ROOT_HASH), (on_top.diff_id, OTHER)]
