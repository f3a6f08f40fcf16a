# SPDX-License-Identifier: Apache-2.0
"""`tardevctl sign` and `tardevctl verify`: signatures of root hashes, which a node may require."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policy.errors import PolicyError, SignatureError
from snapshotter.cli.output import AsJSON, reported, rows

Layers = Annotated[
    list[str],
    typer.Argument(
        metavar="DIGEST=HASH…",
        help="Each layer's digest (sha256:…, of its blob; else its diff ID), and its root hash: 64 hexadecimal digits.",
    ),
]
Store = Annotated[Path, typer.Option(metavar="FILE", help="A JSON file of signatures.")]


def _layers(arguments: list[str]) -> list[tuple[str, str]]:
    """(digest, root hash) of each. Raises SignatureError."""
    from policy.chain import is_digest
    from policy.signature import signed_bytes

    found: list[tuple[str, str]] = []
    for argument in arguments:
        digest, equals, root_hash = argument.partition("=")
        if not equals or not is_digest(digest):
            raise SignatureError(f"{argument[:200]!r} is not DIGEST=HASH, with a digest sha256:…")
        signed_bytes(root_hash)
        found.append((digest, root_hash))
    return found


@reported()
def sign(
    layers: Layers,
    name: Annotated[str, typer.Option(help="Of the image, in the store; one of that name is replaced.")],
    key: Annotated[Path, typer.Option(metavar="PEM", help="Private key: RSA or ECDSA, as the kernel takes them.")],
    cert: Annotated[Path, typer.Option(metavar="PEM", help="The certificate of that key.")],
    store: Store,
    as_json: AsJSON = False,
) -> None:
    """Sign the root hashes of an image's layers, as dm-verity takes it, and put the signatures into a store.

    Nothing is written unless all of them could be signed.
    """
    from policy import signature, signature_store
    from policy.signature_store import SignedImage, SignedLayer

    wanted = _layers(layers)
    private, certificate = signature.load_key(key), signature.load_certificate(cert)
    signed = tuple(
        SignedLayer(digest, root_hash, signature.sign(root_hash, private, certificate)) for digest, root_hash in wanted
    )
    signature_store.add(store, SignedImage(name, signed))
    records = [{"digest": each.digest, "root_hash": each.root_hash, "bytes": len(each.signature)} for each in signed]
    rows(records, ("digest", "root_hash", "bytes"), as_json)


@reported()
def verify(
    layers: Layers,
    cert: Annotated[list[Path], typer.Option(metavar="PEM", help="Certificates of trusted signers; may be repeated.")],
    store: Store,
    as_json: AsJSON = False,
) -> None:
    """Check that each root hash has a signature by a trusted certificate, as a node that requires them does."""
    from policy import signature, signature_store

    wanted = _layers(layers)
    trusted = [each for path in cert for each in signature.load_certificates(path)]
    signed = [layer for image in signature_store.read(store) for layer in image.layers]
    records = []
    for digest, root_hash in wanted:
        why = f"no signature in {store}"
        for each in signed:
            if each.root_hash != root_hash:
                continue
            try:
                signer = signature.verify(each.signature, root_hash, trusted)
            except PolicyError as error:
                why = str(error)
                continue
            records.append(
                {
                    "digest": digest,
                    "root_hash": root_hash,
                    "signer": signer.subject.rfc4514_string(),
                    "serial_number": f"{signer.serial_number:X}",
                }
            )
            break
        else:
            raise SignatureError(f"layer {digest} (root hash {root_hash}): {why}")
    rows(records, ("digest", "root_hash", "signer", "serial_number"), as_json)
