# SPDX-License-Identifier: Apache-2.0
"""`tardevctl sign` and `tardevctl verify`: signatures of root hashes, which a node may require."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy.errors import PolicyError, SignatureError
from snapshotter.cli.output import AsJSON, reported, rows

if TYPE_CHECKING:
    from policy.signature_registry import SignatureRegistry

Layers = Annotated[
    list[str],
    typer.Argument(
        metavar="DIGEST=HASH…",
        help="Each layer's digest (sha256:…, of its blob; else its diff ID), and its root hash: 64 hexadecimal digits.",
    ),
]
Store = Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON file of signatures.")]
PlainHTTP = Annotated[bool, typer.Option("--plain-http", help="The registry has no TLS.")]
_IN_REGISTRY = "HOST/REPOSITORY@sha256:HEX"


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


def _beside(reference: str, plain_http: bool) -> tuple[SignatureRegistry, str]:
    """The registry, and the digest of the image's manifest. Raises SignatureError."""
    from oras.provider import Registry

    from policy.chain import is_digest
    from policy.signature_registry import SignatureRegistry

    repository, at, digest = reference.partition("@")
    if not at or "/" not in repository or not is_digest(digest):
        raise SignatureError(f"{reference[:200]!r} is not {_IN_REGISTRY}")
    client = Registry(insecure=plain_http)
    client.auth.load_configs(client.get_container(repository))  # Docker's
    return SignatureRegistry(repository, client), digest


@reported()
def sign(
    layers: Layers,
    name: Annotated[str, typer.Option(help="Of the image, in the store; one of that name is replaced.")],
    key: Annotated[Path, typer.Option(metavar="PEM", help="Private key: RSA or ECDSA, as the kernel takes them.")],
    cert: Annotated[Path, typer.Option(metavar="PEM", help="The certificate of that key.")],
    store: Store = None,
    push: Annotated[
        str | None, typer.Option(metavar=_IN_REGISTRY, help="Put them beside this image's manifest in its registry.")
    ] = None,
    plain_http: PlainHTTP = False,
    as_json: AsJSON = False,
) -> None:
    """Sign the root hashes of an image's layers, as dm-verity takes it, and put the signatures into a store.

    Nothing is written unless all of them could be signed.
    """
    from policy import signature, signature_store
    from policy.signature_store import SignedImage, SignedLayer

    if store is None and push is None:
        raise typer.BadParameter("a --store or a --push is needed")
    wanted = _layers(layers)
    private, certificate = signature.load_key(key), signature.load_certificate(cert)
    signed = tuple(
        SignedLayer(digest, root_hash, signature.sign(root_hash, private, certificate)) for digest, root_hash in wanted
    )
    image = SignedImage(name, signed)
    if store is not None and store.exists():
        signature_store.read(store)  # before anything is pushed
    if push is not None:
        registry, subject = _beside(push, plain_http)
        registry.push(subject, image)
    if store is not None:
        signature_store.add(store, image)
    records = [{"digest": each.digest, "root_hash": each.root_hash, "bytes": len(each.signature)} for each in signed]
    rows(records, ("digest", "root_hash", "bytes"), as_json)


@reported()
def verify(
    layers: Layers,
    cert: Annotated[list[Path], typer.Option(metavar="PEM", help="Certificates of trusted signers; may be repeated.")],
    store: Store = None,
    fetch: Annotated[
        str | None, typer.Option(metavar=_IN_REGISTRY, help="Take them from beside this image's manifest.")
    ] = None,
    plain_http: PlainHTTP = False,
    as_json: AsJSON = False,
) -> None:
    """Check that each root hash has a signature by a trusted certificate, as a node that requires them does."""
    from policy import signature, signature_store
    from policy.signature_store import SignedImage

    if (store is None) == (fetch is None):
        raise typer.BadParameter("either a --store or a --fetch is needed")
    wanted = _layers(layers)
    trusted = [each for path in cert for each in signature.load_certificates(path)]
    images: list[SignedImage] = []
    if store is not None:
        images = signature_store.read(store)
    elif fetch is not None:
        registry, subject = _beside(fetch, plain_http)
        images = registry.fetch(subject)
    signed = [layer for image in images for layer in image.layers]
    records = []
    for digest, root_hash in wanted:
        why = f"no signature in {store or fetch}"
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
