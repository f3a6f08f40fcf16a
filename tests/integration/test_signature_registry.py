# SPDX-License-Identifier: Apache-2.0
"""Signatures beside an image in a real registry, one without the referrers API."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from oras.provider import Registry as Client
from typer.testing import CliRunner

from policy import signature
from policy.errors import RegistryError, SignatureError
from policy.signature_registry import SignatureRegistry
from policy.signature_store import SignedImage, SignedLayer
from snapshotter.cli.main import app
from tests.harness import Registry, run
from tests.signers import Signer

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.tool]

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def test_signatures_come_back_and_verify(registry: Registry, images: Path, tmp_path: Path) -> None:
    reference = registry.push(images / "hello.tar", "signed/hello:1")
    repository = reference.rpartition(":")[0]
    subject = run("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{reference}").strip()
    beside = SignatureRegistry(repository, Client(insecure=True))
    assert beside.fetch(subject) == []

    root_hash, pushed = "ab" * 32, []
    for name in ("one", "two"):
        signer = Signer(tmp_path, name)
        signed = signature.sign(root_hash, signer.key, signer.certificate)
        image = SignedImage(reference, (SignedLayer("sha256:" + "1" * 64, root_hash, signed),))
        beside.push(subject, image)
        beside.push(subject, image)  # the same again is one artifact
        pushed.append(image)
        assert beside.fetch(subject) == pushed
        signature.verify(beside.fetch(subject)[-1].layers[0].signature, root_hash, [signer.certificate])

    def put(name: str, media_type: str, document: Any) -> None:
        url = f"http://{repository.replace('/', '/v2/', 1)}/manifests/{name}"
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        with urllib.request.urlopen(urllib.request.Request(url, raw, {"Content-Type": media_type}, method="PUT")):
            pass

    def listed(digest: str) -> None:
        entry = {"mediaType": MANIFEST, "digest": digest, "size": 2, "artifactType": "application/vnd.oci.mt.pkcs7"}
        put(subject.replace(":", "-"), INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]})

    last = Signer(tmp_path, "last")
    layer, place = f"sha256:{'2' * 64}={'cd' * 32}", f"{repository}@{subject}"
    key = ["--key", str(last.key_path), "--cert", str(last.certificate_path), "--name", "last"]
    for command in (
        ["sign", layer, *key, "--push", place, "--plain-http"],
        ["verify", layer, "--cert", str(last.certificate_path), "--fetch", place, "--plain-http"],
    ):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr

    # An image's manifest that is listed as one of signatures.
    listed(subject)
    with pytest.raises(SignatureError, match="no artifact with signatures"):
        beside.fetch(subject)
    with pytest.raises(RegistryError, match="not there"):
        beside.push("sha256:" + "9" * 64, pushed[0])
    with pytest.raises(RegistryError, match="is no digest"):
        beside.fetch("latest")
