# SPDX-License-Identifier: Apache-2.0
"""Signatures of layers in a JSON file, in Microsoft's form: an array of images, `{"name", "layers": [{"digest",
"root_hash", "signature"}]}`; the digest is that of the compressed layer, the signature base64 of DER.

Such a file comes from elsewhere: its size is bounded, and what is not understood is an error that names the file.
"""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from policy.chain import is_digest
from policy.errors import SignatureError
from policy.hashed import HashedImage
from policy.signature import SIGNATURE_BYTES_MAX, signed_bytes

FILE_BYTES_MAX: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class SignedLayer:
    """`digest`: of the compressed blob, with "sha256:"; of a layer that has none its diff ID. `signature`: DER."""

    digest: str
    root_hash: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedImage:
    name: str
    layers: tuple[SignedLayer, ...]


class _Layer(msgspec.Struct, forbid_unknown_fields=True):
    digest: str
    root_hash: str
    signature: str


class _Image(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    layers: list[_Layer]


_DECODER: Final = msgspec.json.Decoder(list[_Image])


def to_sign(image: HashedImage) -> list[tuple[str, str]]:
    """(digest, root hash) of each layer, the first one first, and of the parents layer at the end."""
    layers = [*image.layers, *([image.on_top] if image.on_top else [])]
    return [(layer.blob_digest or layer.diff_id, layer.root_hash) for layer in layers]


def parse(raw: bytes) -> list[SignedImage]:
    """Raises SignatureError."""
    if len(raw) > FILE_BYTES_MAX:
        raise SignatureError(f"over {FILE_BYTES_MAX} bytes")
    try:
        decoded = _DECODER.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SignatureError(f"no file of signatures: {error}") from None
    return [
        SignedImage(
            image.name, tuple(signed_layer(each.digest, each.root_hash, each.signature) for each in image.layers)
        )
        for image in decoded
    ]


def signed_layer(digest: str, root_hash: str, signature: str) -> SignedLayer:
    """`signature` in base64. Raises SignatureError."""
    if not is_digest(digest):
        raise SignatureError(f"{digest[:80]!r} is no digest of a layer")
    signed_bytes(root_hash)
    if len(signature) > 2 * SIGNATURE_BYTES_MAX:
        raise SignatureError(f"the signature of layer {digest} is over {SIGNATURE_BYTES_MAX} bytes")
    try:
        der = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"the signature of layer {digest} is not base64: {error}") from None
    if not der or len(der) > SIGNATURE_BYTES_MAX:
        raise SignatureError(
            f"the signature of layer {digest} has {len(der)} bytes, {SIGNATURE_BYTES_MAX} are the most"
        )
    return SignedLayer(digest, root_hash, der)


def encode(images: Sequence[SignedImage]) -> bytes:
    plain = [
        {
            "name": image.name,
            "layers": [
                {
                    "digest": layer.digest,
                    "root_hash": layer.root_hash,
                    "signature": base64.b64encode(layer.signature).decode("ascii"),
                }
                for layer in image.layers
            ],
        }
        for image in images
    ]
    return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"


def read(path: Path) -> list[SignedImage]:
    """Raises SignatureError, OSError."""
    # Not to wait for the writer of a pipe that somebody has put there.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        raw = file.read(FILE_BYTES_MAX + 1)
    try:
        return parse(raw or b"")
    except SignatureError as error:
        raise SignatureError(f"{path}: {error}") from None


def add(path: Path, image: SignedImage) -> None:
    """Into the file, in place of an image of that name, in one step. Raises SignatureError for a file that is none:
    it stays as it is then; OSError."""
    kept = [each for each in read(path) if each.name != image.name] if path.exists() else []
    raw = encode([*kept, image])
    if len(raw) > FILE_BYTES_MAX:
        raise SignatureError(f"{path}: would be over {FILE_BYTES_MAX} bytes: use another file")
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
